"""The verdict: which places differ by more than rounding, what each is called, and whether ids and logits are right."""

from statistics import median
from typing import NamedTuple

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.model.spec import AttentionSpec, MaskSpec, ModelSpec, pattern_of
from actors.tensors.verify.comparison import Comparison, Ending
from actors.tensors.verify.findings import Difference, Findings, Ids
from actors.tensors.verify.recording import LOGITS, Tap
from actors.tensors.verify.tolerance import FACTOR, FLOAT32, judge, judge_choices, rounding_unit

_FURTHEST = 32  # tokens that a second run looks at more closely


class Place(NamedTuple):
    """What is computed at a tap."""

    layer: int | None  # None: before the layers, or behind them
    what: str
    is_inside: bool
    is_of_rank: bool = True  # False: all shards of the stage have the same


def findings(comparison: Comparison) -> Findings:
    """Judge everything that was compared."""
    rounding = rounding_unit(comparison.plan.spec.dtype)
    differences: dict[int | str, Difference] = {}  # the first of each layer, and all outside of layers
    furthest: list[tuple[float, tuple[int, int]]] = []
    layers = set[int]()
    for (tap, rank), rows in comparison.distances.items():
        place = place_of(tap, rank, comparison.plan)
        layers |= set() if place.layer is None or place.is_inside else {place.layer}
        if not rows.ours:  # from here on rounding has decided otherwise for all
            continue
        judgement = (
            judge_choices(rows.ours, rows.own) if rows.are_choices else judge(rows.ours, rows.own or None, rounding)
        )
        if judgement.is_wrong:
            count, of_rank = int(judgement.beyond.sum()), rank if place.is_of_rank else None
            found = (place.what, of_rank, max(rows.ours), judgement.allowed, count, len(rows.ours), place.is_inside)
            differences.setdefault(place.what if place.layer is None else place.layer, Difference(place.layer, *found))
            is_beyond = judgement.beyond.tolist()
            furthest += [(rows.ours[row], rows.places[row]) for row, is_so in enumerate(is_beyond) if is_so]
    distance, allowed, own = _of_logits(comparison.endings, rounding)
    return Findings(
        ids=sum((_ids_of(ending, comparison.endings) for ending in comparison.endings), Ids()),
        logits_distance=distance,
        logits_allowed=allowed,
        own_distance=own,
        num_compared=len(comparison.distances),
        layers_compared=len(layers),
        differences=tuple(differences.values()),
        furthest=frozenset(at for _, at in sorted(furthest, reverse=True)[:_FURTHEST]),
    )


def place_of(tap: Tap, rank: int, plan: Plan) -> Place:
    """What a tap shows, in words for people."""
    spec, name = plan.spec, tap.module
    if tap == LOGITS:
        tensor = spec.embedding_name if spec.tied_head else spec.head_name
        return Place(None, f"{tensor}.weight, which makes the logits", is_inside=True)
    layer = spec.layer_of(name)
    if layer is not None and name == f"{spec.layers_name}.{layer}":
        before = layer - 1 if tap.side == "in" else layer
        if before < 0:
            return Place(None, f"{spec.embedding_name}.weight", is_inside=True, is_of_rank=False)
        return Place(before, f"what {spec.layers_name}.{before} hands on", is_inside=False, is_of_rank=False)
    if "rotary" in name.rpartition(".")[2]:
        of_stage = plan.shards[rank].layers[0] if layer is None else layer
        return Place(of_stage, f"{name}, the rotary embedding (cos and sin)", is_inside=True)
    return Place(layer, _what(spec, tap), is_inside=True)


def _what(spec: ModelSpec, tap: Tap) -> str:
    weights = [parameter.name for parameter in spec.parameters if parameter.name.rpartition(".")[0] == tap.module]
    attention = spec.attention_of(f"{tap.module}.")
    if tap.side == "in":
        inside = attention is not None and tap.module.startswith(f"{attention.name}.")
        return _attention(attention) if inside and attention is not None else f"what enters {tap.module}"
    if not weights:
        return f"what {tap.module} puts out"
    names = f"{tap.module}.weight" if f"{tap.module}.weight" in weights else ", ".join(sorted(weights))
    styles = {spec.styles.get(pattern_of(tap.module)), spec.style_of(weights[0])}
    summed = tap.side == "out" and bool(styles & {"rowwise", "rowwise_split_input", "moe_tp_experts"})
    return f"the sum over the shards, or the bias, of {tap.module}" if summed else names


def _attention(attention: AttentionSpec) -> str:
    mask, parts = attention.mask_spec, [f"{attention.name}, the attention itself"]
    if mask != MaskSpec():
        parts.append(f"window {mask.window}" if mask.window else f"chunk {mask.chunk}")
    parts += [f"soft cap {attention.softcap:g}"] if attention.softcap is not None else []
    parts += ["sinks"] if attention.has_sinks else []
    return " · ".join(parts)


def _of_logits(endings: list[Ending], rounding: float) -> tuple[float, float, float | None]:
    """Of the sequence whose logits are furthest: the median distance, what is allowed, and Transformers' own.

    Sequences in which other experts were chosen are judged together with all others. Layers may make more of the same
    rounding in one sequence than in another, so that none is held to less than what is usual in all.
    """
    units = [[ending] for ending in endings if not ending.is_chaotic]
    units += [endings] if any(ending.is_chaotic for ending in endings) else []
    usual = _own_distance(endings)
    found: list[tuple[float, float, float | None]] = []
    for unit in units:
        ours = median([row for ending in unit for row in _distances(ending.ours, ending.exact)])
        own = _own_distance(unit)
        allowed = FLOAT32 if own is None or usual is None else FACTOR * max(own, usual) + rounding
        found.append((ours, allowed, own))
    return max(found, key=lambda one: one[0] / one[1] if one[0] == one[0] else float("inf"), default=(0.0, 0.0, None))


def _own_distance(endings: list[Ending]) -> float | None:
    """The median of Transformers' own run in the served dtype; None: that is float32."""
    rows = [row for ending in endings if ending.own is not None for row in _distances(ending.own, ending.exact)]
    return median(rows) if rows else None


def _distances(logits: torch.Tensor, exact: torch.Tensor) -> list[float]:
    rows: list[float] = ((logits - exact).norm(dim=1) / exact.norm(dim=1)).tolist()
    return rows


def _ids_of(ending: Ending, endings: list[Ending]) -> Ids:
    chosen = ending.ids.unsqueeze(1)
    reference = ending.exact if ending.own is None else ending.own
    is_equal = reference.argmax(1) == ending.ids
    short = ending.exact.amax(1) - ending.exact.gather(1, chosen).squeeze(1)
    noise = max(map(_noise, endings if ending.is_chaotic else [ending]))
    is_near = ~is_equal & (short <= noise)
    is_sampled = ending.ours.gather(1, chosen).squeeze(1) == ending.ours.amax(1)
    counts = (is_equal, is_near, ~is_equal & ~is_near, ~is_sampled)
    return Ids(len(ending.ids), *(int(one.sum()) for one in counts))


def _noise(ending: Ending) -> float:
    """By how much rounding may change a logit."""
    if ending.own is None:
        return FLOAT32 * float(ending.exact.abs().max())
    return FACTOR * float((ending.own - ending.exact).abs().max())
