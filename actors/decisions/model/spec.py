"""What a model is, in plain data: its layers and attentions, its tensors, the styles of its plan."""

import math
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, TypeVar, cast

from actors.decisions.model.styles import STYLES

DTYPES = ("float32", "bfloat16", "float16")  # in which a model can be served
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "bool": 1}

Position = TypeVar("Position", bound=Any)  # int, or int64 numbers of numpy or torch
Place = Literal["layer", "first", "last", "all"]


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of a tensor."""
    return _DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class Parameter:
    """One tensor of the unsharded model's state (a parameter or a persistent buffer), by Transformers' name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: Place  # in its layer's stage, or outside the layers: in the first or last stage, or in all

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MaskSpec:
    """How far back a token sees: `window` tokens (itself included), and not beyond the start of its `chunk`."""

    window: int | None = None
    chunk: int | None = None

    def first_key(self, position: Position) -> Position:
        """The earliest position that a token sees: of one position, or of each one in an array or a tensor."""
        first: Any = position * 0
        if self.window is not None:
            beyond = position - self.window + 1
            first = beyond * (beyond > 0)
        if self.chunk is not None:
            start = position // self.chunk * self.chunk
            first = first + (start - first) * (start > first)
        return cast("Position", first)


@dataclass(frozen=True)
class AttentionSpec:
    """One attention: what the model hands to the attention function."""

    name: str  # of the module, e.g. model.layers.3.self_attn
    num_heads: int
    num_kv_heads: int  # of the keys that are cached: for latent attention the expanded ones
    key_dim: int
    value_dim: int
    mask_spec: MaskSpec = MaskSpec()
    softcap: float | None = None
    has_sinks: bool = False


@dataclass(frozen=True)
class Angles:
    """The cosines and sines that a model hands to its layers, each [1, T, dim]."""

    dim: int
    dtype: str


@dataclass(frozen=True)
class LayerSpec:
    """One layer: most have one attention, some none or two."""

    attentions: tuple[AttentionSpec, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """Facts of one architecture, read once from its config and its parameters; nothing in it is about ranks."""

    architecture: str  # e.g. LlamaForCausalLM
    model_type: str  # e.g. llama
    config_digest: str  # tells whether another node's config.json means the same
    state_shape: tuple[int, ...]  # what layers hand on, for one token; usually (hidden size,)
    hidden_size: int
    vocab_size: int  # rows of the embedding = width of the logits
    max_position: int  # tokens
    dtype: str  # one of DTYPES: weights (but for some that the model keeps in float32), activations and KV cache
    layers: tuple[LayerSpec, ...]
    parameters: tuple[Parameter, ...]  # the tied head's weight is not among them
    styles: dict[str, str] = field(hash=False)  # pattern as Transformers names it, `*` for a layer's number → style
    tied_head: bool  # the head uses the embedding's weight
    experts_per_token: int | None = None  # of a mixture of experts
    grouped_experts: frozenset[str] = frozenset()  # patterns of modules whose experts torch multiplies in groups
    unused: frozenset[str] = frozenset()  # tensors of the checkpoint that text does not need, as of an image encoder
    exchanges_more: bool = False  # layers get more of earlier stages than the hidden states: no stage can hand that on
    layer_outputs: int = 0  # a layer returns a tuple of so many; 0: the hidden states alone
    are_layers_chained: bool = False  # each layer gets what the one before put out, untouched; all get the same angles
    angles: Angles | None = None  # rotary embedding that every layer gets; None: none, or they differ
    same_inputs: frozenset[tuple[str, ...]] = frozenset()  # patterns of a layer's linear modules that get one input
    text_architecture: str | None = None  # of a wrapper around text, images and sound: the class of its text alone
    notes: tuple[str, ...] = ()  # what was read otherwise than config.json says, or assumed, in words
    embedding_name: str = "model.embed_tokens"
    layers_name: str = "model.layers"
    head_name: str = "lm_head"
    revision: str | None = None  # commit of a hub id, version of a URL: every rank, also a later one, loads the same

    @property
    def num_layers(self) -> int:
        """Layers of the unsharded model."""
        return len(self.layers)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of the activations and the KV cache."""
        return dtype_bytes(self.dtype)

    @property
    def base_name(self) -> str:
        """The module around the layers, e.g. model: patterns of a plan may leave it out."""
        return self.layers_name.rpartition(".")[0]

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """The attentions of all layers, in order."""
        return tuple(attention for layer in self.layers for attention in layer.attentions)

    def same_input_groups(self, layers: tuple[int, int]) -> list[tuple[str, ...]]:
        """The names of linear modules that get the same input, in the layers [first, end)."""
        return [
            tuple(pattern.replace(f"{self.layers_name}.*", f"{self.layers_name}.{layer}", 1) for pattern in patterns)
            for layer in range(*layers)
            for patterns in sorted(self.same_inputs)
        ]

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a parameter or module belongs to, None outside the layer list."""
        return _layer_of(self.layers_name, name)

    def style_of(self, name: str) -> str | None:
        """The style of a parameter: its own entry in the plan, or its module's (as Transformers looks it up)."""
        pattern = pattern_of(name)
        return self.styles.get(pattern) or self.styles.get(pattern.rpartition(".")[0])

    def is_cut(self, attention: AttentionSpec) -> bool:
        """Whether each shard has some of its heads: its output enters the projection that sums over the shards."""
        prefix = pattern_of(attention.name) + "."
        return any(pattern.startswith(prefix) for pattern in self._rowwise)

    @cached_property
    def _rowwise(self) -> tuple[str, ...]:
        return tuple(pattern for pattern, style in self.styles.items() if style == "rowwise")

    def is_vocabulary(self, name: str) -> bool:
        """Whether a parameter has a row for each token of the vocabulary."""
        return name in (f"{self.embedding_name}.weight", f"{self.head_name}.weight", f"{self.head_name}.bias")

    def columns_of(self, parameter: Parameter) -> int | None:
        """Equal units that its style deals to shards; None where heads or the vocabulary decide, or nothing is cut."""
        style = STYLES[self.style_of(parameter.name) or "replicate"]
        attention = self.attention_of(parameter.name)
        has_heads = attention is not None and self.is_cut(attention)
        if style.cuts is None or self.is_vocabulary(parameter.name) or has_heads:
            return None
        dim = cut_dim(style.cuts, parameter.shape)
        return None if dim is None else parameter.shape[dim] // (style.pieces * style.together)

    def is_grouped(self, parameter: Parameter) -> bool:
        """Whether it is the weight of stacked experts that are multiplied in groups."""
        owner = pattern_of(parameter.name).rpartition(".")[0]
        return len(parameter.shape) == 3 and owner in self.grouped_experts

    def attention_of(self, name: str) -> AttentionSpec | None:
        """The attention that a parameter belongs to."""
        layer = self.layer_of(name)
        found = () if layer is None else self.layers[layer].attentions
        around = [attention for attention in found if name.startswith(attention.name + ".")]
        return around[0] if len(around) == 1 else max(around, key=lambda one: len(one.name), default=None)


@cache
def _layer_of(layers_name: str, name: str) -> int | None:
    if not name.startswith(layers_name + "."):
        return None
    number = name[len(layers_name) + 1 :].partition(".")[0]
    return int(number) if number.isdecimal() else None


@cache
def pattern_of(name: str) -> str:
    """A name with `*` in place of every number, as plans spell it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def cut_dim(cuts: Literal["rows", "columns"], shape: tuple[int, ...]) -> int | None:
    """The dimension that is cut; None for a number, and for the bias of outputs that are summed: it is added once."""
    if not shape:
        return None
    if len(shape) == 1:
        return 0 if cuts == "rows" else None
    return len(shape) - (2 if cuts == "rows" else 1)
