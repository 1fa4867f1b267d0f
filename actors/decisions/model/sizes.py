"""Decides which tensor- and pipeline-parallel sizes a model can have, with every reason why one is not valid."""

from dataclasses import dataclass
from typing import Any

from actors.decisions.model.spec import ModelSpec
from cluster.topology import Topology

_GROUPED_BYTES = 16  # torch's grouped product wants every row of a matrix to begin at a multiple of so many bytes


@dataclass(frozen=True)
class Sizes:
    """The numbers that shards and stages must divide. There are several of a kind where layers differ."""

    num_layers: int
    heads: frozenset[int]
    kv_heads: frozenset[int]
    columns: frozenset[int]  # of the feed-forward networks, and of all else that is cut evenly
    grouped: frozenset[int] = frozenset()  # those of the columns that are multiplied in groups, one an expert
    alignment: int = 1  # so many columns of a group, or a multiple of it, are on each shard

    @classmethod
    def of(cls, spec: ModelSpec) -> "Sizes":
        """The sizes of a model whose plan is known."""
        cut = [attention for attention in spec.attentions if spec.is_cut(attention)]
        columns = {parameter: spec.columns_of(parameter) for parameter in spec.parameters}
        grouped = {size for parameter, size in columns.items() if spec.is_grouped(parameter)}
        return cls(
            spec.num_layers,
            frozenset(attention.num_heads for attention in cut),
            frozenset(attention.num_kv_heads for attention in cut),
            frozenset(size for size in columns.values() if size is not None),
            frozenset(size for size in grouped if size is not None),
            _GROUPED_BYTES // spec.dtype_bytes if grouped else 1,
        )

    @classmethod
    def guess(cls, raw_config: dict[str, Any]) -> "Sizes | None":
        """The sizes in a config.json, without importing Transformers; None where it has other names for them."""
        try:
            heads = raw_config["num_attention_heads"]
            kv_heads = raw_config.get("num_key_value_heads") or heads
            columns = raw_config["intermediate_size"]
            sizes = cls(
                raw_config["num_hidden_layers"], frozenset({heads}), frozenset({kv_heads}), frozenset({columns})
            )
        except KeyError:
            return None
        is_plain = all(isinstance(size, int) for size in (sizes.num_layers, heads, kv_heads, columns))
        return sizes if is_plain else None


def broken_constraints(sizes: Sizes, topology: Topology) -> list[str]:
    """Every reason why this model cannot be cut this way, each with the sizes that would work; empty when it can."""
    tp, pp = topology.tensor_parallel_size, topology.pipeline_parallel_size
    key = "parallel.tensor_parallel_size"
    works = "sizes that would work: " + ", ".join(map(str, valid_tensor_parallel_sizes(sizes)))
    reasons = [
        f"{key}: {heads} attention heads are not divisible by {tp}; {works}"
        for heads in sorted(sizes.heads)
        if heads % tp
    ]
    reasons += [
        f"{key}: {kv_heads} KV heads cannot be split or replicated {tp} ways; {works}"
        for kv_heads in sorted(sizes.kv_heads)
        if not _can_share(kv_heads, tp)
    ]
    reasons += [
        f"{key}: {columns} ffn columns are not divisible by {tp}; {works}"
        for columns in sorted(sizes.columns)
        if columns % tp
    ]
    reasons += [
        f"{key}: {columns} columns of each expert are {columns // tp} on each of {tp} shards, but torch's grouped "
        f"product takes multiples of {sizes.alignment} in this dtype; {works}"
        for columns in sorted(sizes.grouped)
        if columns % tp == 0 and not _is_aligned(columns, tp, sizes.alignment)
    ]
    if pp > sizes.num_layers:
        reasons.append(
            f"parallel.pipeline_parallel_size: {pp} stages for {sizes.num_layers} layers; "
            f"at most {sizes.num_layers} would work"
        )
    return reasons


def valid_tensor_parallel_sizes(sizes: Sizes) -> list[int]:
    """Shard counts that heads, KV heads and columns allow, ascending."""
    largest = min(sizes.heads | sizes.columns, default=1)
    return [
        tp
        for tp in range(1, largest + 1)
        if all(size % tp == 0 for size in sizes.heads | sizes.columns)
        and all(_is_aligned(columns, tp, sizes.alignment) for columns in sizes.grouped)
        and all(_can_share(kv_heads, tp) for kv_heads in sizes.kv_heads)
    ]


def _is_aligned(columns: int, tp: int, alignment: int) -> bool:
    return tp == 1 or columns // tp % alignment == 0


def _can_share(kv_heads: int, tp: int) -> bool:
    return max(kv_heads, tp) % min(kv_heads, tp) == 0
