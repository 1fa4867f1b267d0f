"""What each rank owns: its layers, its heads of every attention, its vocabulary rows, and the slice of every tensor.

All sharding rules are here, and nowhere else. Model building, loader, KV cache, memory estimate and `/cluster` read it.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from actors.decisions.model.sizes import Sizes, broken_constraints
from actors.decisions.model.spec import AttentionSpec, ModelSpec, Parameter, cut_dim, dtype_bytes
from actors.decisions.model.styles import STYLES, Style
from actors.words.errors import UnsupportedModel
from cluster.topology import Topology

Interval = tuple[int, int]  # [first, end)

_OF_KV_HEADS = ("k_proj", "v_proj", "k_norm")  # in an attention; all else that is cut has a part for every head


@dataclass(frozen=True)
class TensorSlice:
    """The part of one parameter that a rank holds: intervals by dimension, joined in order."""

    name: str  # in the model
    key: str  # under which the checkpoint has it (a tied head: the embedding's)
    full_shape: tuple[int, ...]
    intervals: tuple[tuple[Interval, ...], ...]  # one tuple of intervals a dimension
    dtype: str
    is_zero: bool = False  # the rank holds zeros of this shape, whatever the checkpoint has: another shard adds it

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape on the rank."""
        return tuple(sum(end - first for first, end in dim) for dim in self.intervals)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes on the rank."""
        return math.prod(self.shape) * dtype_bytes(self.dtype)


@dataclass(frozen=True)
class AttentionShard:
    """The heads of one attention that a rank computes; intervals in the unsharded model's numbering."""

    spec: AttentionSpec
    heads: Interval
    kv_heads: Interval

    @property
    def num_heads(self) -> int:
        """Heads on this rank."""
        return self.heads[1] - self.heads[0]

    @property
    def num_kv_heads(self) -> int:
        """KV heads on this rank."""
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def local_spec(self) -> AttentionSpec:
        """The attention as this rank computes it: with its own numbers of heads."""
        return replace(self.spec, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)

    @property
    def cached_elements(self) -> int:
        """Elements that one token takes in the KV cache."""
        return self.num_kv_heads * (self.spec.key_dim + self.spec.value_dim)


@dataclass(frozen=True)
class ShardPlan:
    """What one rank owns."""

    rank: int
    stage: int
    shard: int
    layers: Interval
    attentions: tuple[AttentionShard, ...]  # of its layers, in order
    vocab_rows: Interval
    has_embedding: bool
    has_head: bool
    shares_tied_weight: bool  # the head uses this rank's own embedding tensor
    tensors: tuple[TensorSlice, ...] = ()

    @property
    def num_layers(self) -> int:
        """Layers on this rank."""
        return self.layers[1] - self.layers[0]

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of this rank."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def make_shard_plans(
    spec: ModelSpec, topology: Topology, layers_per_stage: tuple[int, ...] | None = None
) -> tuple[ShardPlan, ...]:
    """Make the plans of all ranks, in rank order.

    Raises ValueError with every broken constraint, UnsupportedModel for a tensor that cannot be cut as its style says.
    """
    reasons = broken_constraints(Sizes.of(spec), topology)
    if reasons:
        raise ValueError("\n".join(reasons))
    cuts = _given_cut(spec, topology, layers_per_stage) if layers_per_stage else cut_by_cost(spec, topology)
    return tuple(_shard_plan(spec, topology, rank, cuts[topology.stage(rank)]) for rank in range(topology.num_ranks))


def split_evenly(total: int, shard: int, num_shards: int) -> Interval:
    """The interval of a shard; sizes differ by at most one (vocabularies need not be divisible)."""
    return shard * total // num_shards, (shard + 1) * total // num_shards


def cut_by_cost(spec: ModelSpec, topology: Topology) -> list[Interval]:
    """The layers of each stage, cut so that the slowest stage is as fast as possible, and the rest as even as possible.

    The cost of a stage is the weights that a token reads: of its layers, and of the head on the last stage. Of an
    embedding a token reads one row, which takes no time.
    """
    layer_cost = [0] * spec.num_layers
    tail_cost = 0
    for parameter in spec.parameters:
        layer = spec.layer_of(parameter.name)
        if layer is not None:
            layer_cost[layer] += parameter.numel
        elif parameter.place == "last":
            tail_cost += parameter.numel
    if spec.tied_head:
        tail_cost += spec.vocab_size * spec.hidden_size
    prefix = [0]
    for cost in layer_cost:
        prefix.append(prefix[-1] + cost)
    # best[end] = (largest stage cost, sum of squares, boundaries) for the layers before `end`, stage by stage
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [0])}
    num_stages = topology.pipeline_parallel_size
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        following: dict[int, tuple[int, int, list[int]]] = {}
        ends = [spec.num_layers] if is_last else range(stage + 1, spec.num_layers - (num_stages - stage - 2))
        for end in ends:
            options = []
            for first, (largest, squares, bounds) in best.items():
                if first < end:
                    cost = prefix[end] - prefix[first] + (tail_cost if is_last else 0)
                    options.append((max(largest, cost), squares + cost * cost, [*bounds, end]))
            if options:
                following[end] = min(options)
        best = following
    bounds = best[spec.num_layers][2]
    return list(pairwise(bounds))


def check_given_cut(spec: ModelSpec, topology: Topology, layers_per_stage: tuple[int, ...] | None) -> None:
    """Raises ValueError where the config's layers of each stage do not fit the model or the number of stages."""
    if layers_per_stage is None:
        return
    if (
        len(layers_per_stage) != topology.pipeline_parallel_size
        or sum(layers_per_stage) != spec.num_layers
        or min(layers_per_stage) < 1
    ):
        raise ValueError(
            f"parallel.layers_per_stage: {list(layers_per_stage)} does not deal {spec.num_layers} layers to "
            f"{topology.pipeline_parallel_size} stages of at least one layer; leave it out to have them dealt by cost"
        )


def _given_cut(spec: ModelSpec, topology: Topology, layers_per_stage: tuple[int, ...]) -> list[Interval]:
    check_given_cut(spec, topology, layers_per_stage)
    bounds = [sum(layers_per_stage[:stage]) for stage in range(len(layers_per_stage) + 1)]
    return list(pairwise(bounds))


def _shard_plan(spec: ModelSpec, topology: Topology, rank: int, layers: Interval) -> ShardPlan:
    is_first, is_last = topology.is_first_stage(rank), topology.is_last_stage(rank)
    owned = [attention for layer in spec.layers[slice(*layers)] for attention in layer.attentions]
    plan = ShardPlan(
        rank=rank,
        stage=topology.stage(rank),
        shard=topology.shard(rank),
        layers=layers,
        attentions=tuple(_attention_shard(spec, topology, rank, attention) for attention in owned),
        vocab_rows=split_evenly(spec.vocab_size, topology.shard(rank), topology.tensor_parallel_size),
        has_embedding=is_first,
        has_head=is_last,
        shares_tied_weight=spec.tied_head and is_first and is_last,
    )
    cutter = _Cutter(spec, plan, topology.tensor_parallel_size)
    tensors = [cutter.slice(parameter) for parameter in spec.parameters if _is_owned(spec, plan, parameter)]
    if spec.tied_head and is_last and not is_first:
        key = f"{spec.embedding_name}.weight"
        embedding = next(parameter for parameter in spec.parameters if parameter.name == key)
        tensors.append(replace(cutter.slice(replace(embedding, name=f"{spec.head_name}.weight")), key=key))
    return replace(plan, tensors=tuple(tensors))


def _attention_shard(spec: ModelSpec, topology: Topology, rank: int, attention: AttentionSpec) -> AttentionShard:
    tp, shard = topology.tensor_parallel_size, topology.shard(rank)
    if not spec.is_cut(attention):
        return AttentionShard(attention, (0, attention.num_heads), (0, attention.num_kv_heads))
    kv_heads = split_evenly(attention.num_kv_heads, shard, tp)
    if tp > attention.num_kv_heads:  # each KV head is held by tp / num_kv_heads shards, next to the queries that use it
        kv_head = shard * attention.num_kv_heads // tp
        kv_heads = (kv_head, kv_head + 1)
    return AttentionShard(attention, split_evenly(attention.num_heads, shard, tp), kv_heads)


def _is_owned(spec: ModelSpec, plan: ShardPlan, parameter: Parameter) -> bool:
    match parameter.place:
        case "layer":
            layer = spec.layer_of(parameter.name)
            return layer is not None and plan.layers[0] <= layer < plan.layers[1]
        case "first":
            return plan.has_embedding
        case "last":
            return plan.has_head
        case "all":
            return True


@dataclass(frozen=True)
class _Cutter:
    """Cuts parameters for one rank."""

    spec: ModelSpec
    plan: ShardPlan
    num_shards: int

    @cached_property
    def _by_name(self) -> dict[str, AttentionShard]:
        return {shard.spec.name: shard for shard in self.plan.attentions}

    def slice(self, parameter: Parameter) -> TensorSlice:
        """The part of a parameter that the rank holds, by the style of the parameter."""
        whole = tuple(((0, size),) for size in parameter.shape)
        name = self.spec.style_of(parameter.name) or "replicate"
        style = STYLES[name]
        dim = None if style.cuts is None else cut_dim(style.cuts, parameter.shape)
        intervals: tuple[tuple[Interval, ...], ...] = whole
        if dim is not None:
            size = parameter.shape[dim]
            cut = self._qkv(parameter, size) if name == "qkv_colwise" else self._equal_pieces(parameter, size, style)
            intervals = (*whole[:dim], cut, *whole[dim + 1 :])
        is_zero = style.is_on_first and self.plan.shard > 0
        return TensorSlice(parameter.name, parameter.name, parameter.shape, intervals, parameter.dtype, is_zero)

    def _equal_pieces(self, parameter: Parameter, size: int, style: Style) -> tuple[Interval, ...]:
        piece_size = size // style.pieces
        first, end = (bound * style.together for bound in self._interval(parameter, piece_size // style.together))
        return tuple((piece + first, piece + end) for piece in range(0, size, piece_size))

    def _interval(self, parameter: Parameter, size: int) -> Interval:
        """The part of a cut dimension that this rank holds: vocabulary rows, heads, or an even share."""
        if self.spec.is_vocabulary(parameter.name):
            return self.plan.vocab_rows
        shard = self._attention_of(parameter)
        if shard is None:
            return split_evenly(size, self.plan.shard, self.num_shards)
        has_kv_heads = parameter.name.split(".")[-2] in _OF_KV_HEADS
        return self._heads(parameter, size, shard, has_kv_heads)

    def _attention_of(self, parameter: Parameter) -> AttentionShard | None:
        attention = self.spec.attention_of(parameter.name)
        return None if attention is None else self._by_name.get(attention.name)

    def _heads(self, parameter: Parameter, size: int, shard: AttentionShard, has_kv_heads: bool) -> Interval:
        """The rank's heads. Projections of an attention that is not cut are cut evenly, and their outputs gathered."""
        total = shard.spec.num_kv_heads if has_kv_heads else shard.spec.num_heads
        if not self.spec.is_cut(shard.spec):
            return split_evenly(size, self.plan.shard, self.num_shards)
        if size % total:
            raise UnsupportedModel(
                f"{self.spec.architecture}: {parameter.name} has {size} rows or columns to cut, not a multiple of "
                f"{total} heads; no rule says how they are dealt to shards"
            )
        first, end = shard.kv_heads if has_kv_heads else shard.heads
        return first * size // total, end * size // total

    def _qkv(self, parameter: Parameter, size: int) -> tuple[Interval, ...]:
        """Query heads, then key heads, then value heads."""
        shard = self._attention_of(parameter)
        assert shard is not None
        spec = shard.spec
        parts = (
            (shard.heads, spec.num_heads, spec.key_dim),
            (shard.kv_heads, spec.num_kv_heads, spec.key_dim),
            (shard.kv_heads, spec.num_kv_heads, spec.value_dim),
        )
        intervals, start = [], 0
        for (first, end), count, width in parts:
            intervals.append((start + first * width, start + end * width))
            start += count * width
        assert start == size, f"{parameter.name} has {size} rows, its heads {start}"
        return tuple(intervals)
