"""The rule by which stored tensors may be left out: only where nothing that the model computes can depend on them."""

import re
from collections.abc import Iterable, Sequence

from actors.decisions.model.spec import ModelSpec
from actors.tensors.weights.conversion import Leftover, Structure
from actors.tensors.weights.safetensors_index import in_short
from actors.words.errors import CheckpointError

# Of rotary embeddings, which older checkpoints store in every layer: Transformers computes them from config.json
_ROTARY_TABLE = re.compile(r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
# What belongs to a weight in another form: with it, the weight beside it means something else
_OF_QUANTIZED = re.compile(
    r"((weight|global|input|output|act|proj|\b[qkv])_scale(_inv|_2)?|(\.|proj_)scales|(proj|weight)_(blocks|packed)"
    r"|weight_zero_point|qweight|qzeros|g_idx|absmax|quant_map|quant_state.*|_amax|\bSCB)$"
)
# What is added to a weight when the model runs; its name may begin with anything
_OF_ADAPTER = re.compile(r"\.lora_[a-zA-Z]|\.base_layer\.|\.modules_to_save\.")


class Rule:
    """Tells which tensors a served model may leave out."""

    def __init__(self, spec: ModelSpec, structure: Structure) -> None:
        self._spec = spec
        self._structure = structure
        self._ignored = re.compile("|".join(f"({pattern})" for pattern in structure.ignored) or "$^")
        self._has_rotary = any(name.endswith("inv_freq") for name in structure.computed)
        self._used = _with_parents(parameter.name for parameter in spec.parameters)
        self._idle = _with_parents(spec.unused) - self._used

    def may_be_left_out(self, name: str) -> bool:
        """Whether a tensor that the model has no place for cannot change what the model answers.

        It cannot in five cases:

        - Transformers says of the family that its checkpoints hold it, and that it is not for this model.
        - It is a table that the model computes from config.json.
        - It belongs to a layer beyond the last one of config.json, such as one that predicts a further token.
        - It belongs to a part of the model that text does not use, such as an image encoder.
        - It belongs to a part that the model has not, and that stands beside its layers: a further head, a tower, a
          projector. Inside the base model, such a part has modules of its own: a single one, as a norm or an embedding
          of positions, may be a step on the way of the hidden states.

        All else lies in a module that the model computes with: a bias, a norm, a scale. The weights then come from a
        model that computes something else, and Transformers, which leaves these out too, answers wrong.
        """
        if self._ignored.search(name) or name in self._structure.computed:
            return True
        if self._has_rotary and _ROTARY_TABLE.search(name):
            return True
        owner, rest = self._structure.owner(name)
        layers = self._spec.layers_name
        if owner == layers:
            return rest[0].isdecimal() and int(rest[0]) >= self._spec.num_layers
        if owner == "" or layers.startswith(f"{owner}."):
            return len(rest) > (1 if owner == "" else 2) and _OF_ADAPTER.search(name) is None
        while owner not in self._used and owner not in self._idle:  # it holds no tensors: what holds it decides
            owner = owner.rpartition(".")[0]
        return owner in self._idle


def leave_out(leftovers: Sequence[Leftover], spec: ModelSpec, structure: Structure) -> list[str]:
    """A sentence for the log on what is left out, if anything is.

    Raises CheckpointError, with file, tensor and remedy, for tensors that may not be left out.
    """
    if not leftovers:
        return []
    rule = Rule(spec, structure)
    harmful = [leftover for leftover in leftovers if not rule.may_be_left_out(leftover.name)]
    if harmful:
        raise CheckpointError(_refusal(harmful, spec.architecture, structure))
    keys = [leftover.stored.key for leftover in leftovers]
    return [f"left out, as {spec.architecture} computes nothing with them: {in_short(keys)}"]


def _refusal(harmful: Sequence[Leftover], architecture: str, structure: Structure) -> str:
    quantized = [leftover for leftover in harmful if _OF_QUANTIZED.search(leftover.stored.key)]
    stored, name = (quantized or harmful)[0]
    others = f" (and {len(harmful) - 1} more)" if harmful[1:] else ""
    if quantized:
        return f"{stored.file} holds {stored.key}{others}, a part of quantized weights; use the unquantized checkpoint"
    if _OF_ADAPTER.search(name):
        return f"{stored.file} holds {stored.key}{others}, a part of an adapter; merge it into the weights first"
    owner, _ = structure.owner(name)
    place = f" in {owner}" if owner else ""
    return (
        f"{stored.file} holds {stored.key}{others}, which {architecture} has no place for{place}: the weights come "
        "from a model that computes more. Correct config.json, or use a checkpoint of this architecture"
    )


def _with_parents(tensors: Iterable[str]) -> frozenset[str]:
    """The modules that hold tensors, themselves or further in; the root is among them."""
    found = {""}
    for name in tensors:
        parts = name.split(".")
        found.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return frozenset(found)
