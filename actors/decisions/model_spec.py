"""What a model is, in plain data: sizes, parameters, the styles of its own plan, and which cuts are valid."""

import re
from dataclasses import dataclass, field
from typing import Any

from cluster.topology import Topology

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the unsharded model, by Transformers' name."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


@dataclass(frozen=True)
class LayerSpec:
    """What attention of one layer sees: `window` tokens back at most (itself included), or everything."""

    window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Facts of one architecture, read once from its config and its parameters; nothing in it is about ranks."""

    architecture: str  # e.g. LlamaForCausalLM
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int  # rows of the embedding = width of the logits
    max_position: int  # tokens
    dtype: str  # a key of DTYPE_BYTES: weights, activations and KV cache
    tied_head: bool  # the head uses the embedding's weight
    layers: tuple[LayerSpec, ...]
    parameters: tuple[Parameter, ...]  # the tied head's weight is not among them
    styles: dict[str, str] = field(hash=False)  # pattern as Transformers names it, `*` for a layer's number → style
    embedding_name: str = "model.embed_tokens"
    layers_name: str = "model.layers"
    head_name: str = "lm_head"

    @property
    def num_layers(self) -> int:
        """Layers of the unsharded model."""
        return len(self.layers)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a parameter or module belongs to, None outside the layer list."""
        match = re.match(re.escape(self.layers_name) + r"\.(\d+)(\.|$)", name)
        return int(match.group(1)) if match else None

    def style_of(self, name: str) -> str | None:
        """The style of a parameter: its own entry in the plan, or its module's (as Transformers looks it up)."""
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        return self.styles.get(pattern) or self.styles.get(pattern.rpartition(".")[0])


@dataclass(frozen=True)
class Sizes:
    """The few numbers that decide which cuts are valid."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int

    @classmethod
    def of(cls, raw_config: dict[str, Any]) -> "Sizes | None":
        """From a config.json as it is on disk, without importing Transformers; None when it names them differently."""
        try:
            heads = raw_config["num_attention_heads"]
            kv_heads = raw_config.get("num_key_value_heads") or heads
            return cls(raw_config["num_hidden_layers"], heads, kv_heads, raw_config["intermediate_size"])
        except KeyError:
            return None


def broken_constraints(spec: "ModelSpec | Sizes", topology: Topology) -> list[str]:
    """Every reason why this model cannot be cut this way, each with the sizes that would work; empty when it can."""
    tp, pp = topology.tensor_parallel_size, topology.pipeline_parallel_size
    key = "parallel.tensor_parallel_size"
    reasons = []
    if spec.num_heads % tp:
        reasons.append(f"{key}: {spec.num_heads} attention heads are not divisible by {tp}; {_sizes(spec)}")
    elif max(spec.num_kv_heads, tp) % min(spec.num_kv_heads, tp):
        reasons.append(f"{key}: {spec.num_kv_heads} KV heads cannot be split or replicated {tp} ways; {_sizes(spec)}")
    if spec.ffn_size % tp:
        reasons.append(f"{key}: {spec.ffn_size} ffn columns are not divisible by {tp}; {_sizes(spec)}")
    if pp > spec.num_layers:
        reasons.append(
            f"parallel.pipeline_parallel_size: {pp} stages for {spec.num_layers} layers; "
            f"at most {spec.num_layers} would work"
        )
    return reasons


def valid_tensor_parallel_sizes(spec: "ModelSpec | Sizes") -> list[int]:
    """Shard counts that heads, KV heads and ffn columns allow, ascending."""
    return [
        tp
        for tp in range(1, spec.num_heads + 1)
        if not spec.num_heads % tp
        and not spec.ffn_size % tp
        and not max(spec.num_kv_heads, tp) % min(spec.num_kv_heads, tp)
    ]


def _sizes(spec: "ModelSpec | Sizes") -> str:
    return "sizes that would work: " + ", ".join(map(str, valid_tensor_parallel_sizes(spec)))
