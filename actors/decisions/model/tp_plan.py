"""Decides which style each module gets: the model's own plan and the config's rules, or why they are refused."""

import difflib
from collections.abc import Mapping
from dataclasses import replace

from actors.decisions.model.spec import ModelSpec, Parameter, pattern_of
from actors.decisions.model.styles import STYLES
from actors.words.errors import UnsupportedModel
from configs.config import ParallelConfig

_KEY = "parallel.tp_plan"
_LARGE = 0.1  # share of a layer's parameters: no shard holds such a tensor whole unless the config says so


def with_tp_plan(spec: ModelSpec, parallel: ParallelConfig) -> ModelSpec:
    """The spec with the styles that are used.

    Raises ValueError for a wrong rule in the config and for a large matrix that no rule cuts, UnsupportedModel where
    the model's own plan names an unknown style.
    """
    asked = {} if parallel.tp_plan == "auto" else _named(parallel.tp_plan, spec)
    _check_own(spec)
    kept = {} if asked and parallel.tp_plan_mode == "replace" else spec.styles
    spec = replace(spec, styles={**kept, **asked, **_of_vocabulary(spec, asked)})
    _check_sums(spec, asked)
    if parallel.tensor_parallel_size > 1 and not parallel.allow_replication:
        _refuse_large(spec)
    return spec


def _named(asked: Mapping[str, str], spec: ModelSpec) -> dict[str, str]:
    """The rules of the config, by full patterns. Raises ValueError for an unknown style or pattern."""
    names = {pattern_of(name) for parameter in spec.parameters for name in _prefixes(parameter.name)}
    rules = {}
    for pattern, style in asked.items():
        if style not in STYLES:
            raise ValueError(f"{_KEY}: {pattern!r}: {style!r} is no style; styles are {', '.join(STYLES)}")
        full = next((name for name in (pattern, f"{spec.base_name}.{pattern}") if name in names), None)
        if full is None:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            raise ValueError(
                f"{_KEY}: {pattern!r} matches no module of {spec.architecture}"
                + (f"; near are {', '.join(near)}" if near else "")
            )
        rules[full] = style
    return rules


def _of_vocabulary(spec: ModelSpec, asked: Mapping[str, str]) -> dict[str, str]:
    """Embedding and head are always cut by vocabulary: sampling works on each shard's part of the logits."""
    fixed = {spec.embedding_name: "embedding_rowwise", spec.head_name: "colwise_gather_output"}
    for name, style in fixed.items():
        if asked.get(name, style) not in (style, "colwise" if name == spec.head_name else style):
            raise ValueError(f"{_KEY}: {name!r} is always {style} here, not {asked[name]}; leave it out")
    return fixed


def _prefixes(name: str) -> list[str]:
    """The names of a parameter and of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _check_own(spec: ModelSpec) -> None:
    unknown = sorted({style for style in spec.styles.values() if style not in STYLES})
    if unknown:
        raise UnsupportedModel(
            f"{spec.architecture}: its tensor-parallel plan uses {', '.join(unknown)}, which is not known here; "
            f"known styles: {', '.join(STYLES)}"
        )


def _check_sums(spec: ModelSpec, asked: Mapping[str, str]) -> None:
    """Raises ValueError for rules that would run and give wrong numbers: cut tensors whose results are never summed."""
    for pattern, style in asked.items():
        if spec.styles.get(pattern.rpartition(".")[0]) == "local_params":
            continue
        is_tensor = any(pattern_of(parameter.name) == pattern for parameter in spec.parameters)
        owner = pattern.rpartition(".")[0]
        is_part = STYLES[style].cuts is not None or STYLES[style].is_on_first
        if is_tensor and is_part and spec.styles.get(owner) not in ("moe_tp_experts", "all_reduce"):
            raise ValueError(
                f"{_KEY}: {pattern!r} is dealt to shards ({style}), but nothing sums what {owner} returns; "
                f"add {owner!r}: moe_tp_experts, or cut whole modules instead of tensors"
            )
    for attention in spec.attentions:
        prefix = pattern_of(attention.name)
        uncut = [
            name
            for name in ("q_proj", "k_proj", "v_proj")
            if f"{prefix}.{name}" in asked and spec.is_cut(attention) != (asked[f"{prefix}.{name}"] == "colwise")
        ]
        if uncut:
            raise ValueError(
                f"{_KEY}: {prefix}.{uncut[0]} and {prefix}.o_proj do not fit: give q_proj, k_proj and v_proj colwise "
                "with o_proj rowwise, or all of them replicate"
            )


def _refuse_large(spec: ModelSpec) -> None:
    totals: dict[int, int] = {}
    for parameter in spec.parameters:
        layer = spec.layer_of(parameter.name)
        if layer is not None:
            totals[layer] = totals.get(layer, 0) + parameter.numel
    large = [parameter.name for parameter in spec.parameters if _is_large_and_whole(spec, parameter, totals)]
    whole = {pattern_of(name).removesuffix(".weight") for name in large}
    if whole:
        raise ValueError(
            f"{_KEY}: no rule cuts {', '.join(sorted(whole))} of {spec.architecture}: every shard would hold it "
            "whole; name a style for it in parallel.tp_plan (replicate to say that this is meant), or set "
            "parallel.allow_replication"
        )


def _is_large_and_whole(spec: ModelSpec, parameter: Parameter, totals: Mapping[int, int]) -> bool:
    layer = spec.layer_of(parameter.name)
    is_matrix = len(parameter.shape) > 1 and min(parameter.shape) > 1
    if layer is None or not is_matrix or spec.style_of(parameter.name):
        return False
    return parameter.numel >= _LARGE * totals[layer]
