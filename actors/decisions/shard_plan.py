"""What each rank owns: its layers, heads, KV heads, ffn columns, vocabulary rows, and the slice of every tensor.

The only home of the sharding rules. Model building, loader, KV cache, memory estimate and `/cluster` read it.
"""

from dataclasses import dataclass
from itertools import pairwise

from actors.decisions.model_spec import ModelSpec, Parameter, broken_constraints
from actors.words.errors import UnsupportedModel
from cluster.topology import Topology

Interval = tuple[int, int]  # [first, end)

# Dimension that a style cuts, for weights [out, in] and biases [out]; None: every rank holds it whole.
_CUT_DIM: dict[str, int | None] = {
    "colwise": 0,
    "colwise_gather_output": 0,
    "rowwise": 1,
    "embedding_rowwise": 0,
    "replicated_with_grad_allreduce": None,
    "replicate": None,
    "sequence_parallel": None,
}


@dataclass(frozen=True)
class TensorSlice:
    """The part of one parameter that a rank holds: intervals by dimension, joined in order."""

    name: str  # in the model
    key: str  # in the checkpoint (a tied head is read under the embedding's key)
    full_shape: tuple[int, ...]
    intervals: tuple[tuple[Interval, ...], ...]  # one tuple of intervals a dimension

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on the rank."""
        return tuple(sum(end - first for first, end in dim) for dim in self.intervals)

    @property
    def numel(self) -> int:
        """Elements on the rank."""
        return Parameter(self.name, self.shape).numel


@dataclass(frozen=True)
class ShardPlan:
    """What one rank owns. Intervals are [first, end) in the unsharded model's numbering."""

    rank: int
    stage: int
    shard: int
    layers: Interval
    heads: Interval
    kv_heads: Interval
    ffn_columns: Interval
    vocab_rows: Interval
    has_embedding: bool
    has_head: bool
    shares_tied_weight: bool  # the head uses this rank's own embedding tensor
    tensors: tuple[TensorSlice, ...]
    dtype_bytes: int

    @property
    def num_layers(self) -> int:
        """Layers on this rank."""
        return self.layers[1] - self.layers[0]

    @property
    def num_kv_heads(self) -> int:
        """KV heads on this rank."""
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of this rank."""
        return sum(tensor.numel for tensor in self.tensors) * self.dtype_bytes


def make_shard_plans(
    spec: ModelSpec, topology: Topology, layers_per_stage: tuple[int, ...] | None = None
) -> tuple[ShardPlan, ...]:
    """One plan a rank, in rank order.

    Raises ValueError with every broken constraint, UnsupportedModel for unknown styles.
    """
    reasons = broken_constraints(spec, topology)
    if reasons:
        raise ValueError("\n".join(reasons))
    _check_styles(spec)
    cuts = _given_cut(spec, topology, layers_per_stage) if layers_per_stage else cut_by_cost(spec, topology)
    return tuple(_shard_plan(spec, topology, rank, cuts[topology.stage(rank)]) for rank in range(topology.num_ranks))


def split_evenly(total: int, shard: int, num_shards: int) -> Interval:
    """Interval of a shard; sizes differ by at most one (vocabularies need not be divisible)."""
    return shard * total // num_shards, (shard + 1) * total // num_shards


def cut_by_cost(spec: ModelSpec, topology: Topology) -> list[Interval]:
    """Layers of each stage such that the slowest stage is as fast as possible, and the rest as even as possible.

    Cost is what a token reads: the weights of a layer, and of the head on the last stage. An embedding is a lookup of
    one row a token: it costs memory, but no time.
    """
    layer_cost = [0] * spec.num_layers
    tail_cost = 0
    for parameter in spec.parameters:
        layer = spec.layer_of(parameter.name)
        if layer is not None:
            layer_cost[layer] += parameter.numel
        elif not parameter.name.startswith(spec.embedding_name + "."):
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


def _given_cut(spec: ModelSpec, topology: Topology, layers_per_stage: tuple[int, ...]) -> list[Interval]:
    if (
        len(layers_per_stage) != topology.pipeline_parallel_size
        or sum(layers_per_stage) != spec.num_layers
        or min(layers_per_stage) < 1
    ):
        raise ValueError(
            f"parallel.layers_per_stage: {list(layers_per_stage)} does not deal {spec.num_layers} layers to "
            f"{topology.pipeline_parallel_size} stages of at least one layer; leave it out to have them dealt by cost"
        )
    bounds = [sum(layers_per_stage[:stage]) for stage in range(len(layers_per_stage) + 1)]
    return list(pairwise(bounds))


def _check_styles(spec: ModelSpec) -> None:
    unknown = sorted({style for style in spec.styles.values() if style not in _CUT_DIM})
    if unknown:
        raise UnsupportedModel(
            f"{spec.architecture}: its tensor-parallel plan uses {', '.join(unknown)}, which is not built yet; "
            f"known styles: {', '.join(_CUT_DIM)}"
        )


def _shard_plan(spec: ModelSpec, topology: Topology, rank: int, layers: Interval) -> ShardPlan:
    tp, shard = topology.tensor_parallel_size, topology.shard(rank)
    is_first, is_last = topology.is_first_stage(rank), topology.is_last_stage(rank)
    kv_heads = split_evenly(spec.num_kv_heads, shard, tp)
    if tp > spec.num_kv_heads:  # each KV head is held by tp / num_kv_heads shards, next to the queries that use it
        kv_head = shard * spec.num_kv_heads // tp
        kv_heads = (kv_head, kv_head + 1)
    plan = ShardPlan(
        rank=rank,
        stage=topology.stage(rank),
        shard=shard,
        layers=layers,
        heads=split_evenly(spec.num_heads, shard, tp),
        kv_heads=kv_heads,
        ffn_columns=split_evenly(spec.ffn_size, shard, tp),
        vocab_rows=split_evenly(spec.vocab_size, shard, tp),
        has_embedding=is_first,
        has_head=is_last,
        shares_tied_weight=spec.tied_head and is_first and is_last,
        tensors=(),
        dtype_bytes=spec.dtype_bytes,
    )
    tensors = [_slice(spec, plan, parameter) for parameter in spec.parameters if _is_owned(spec, plan, parameter.name)]
    if spec.tied_head and is_last and not is_first:
        head = Parameter(f"{spec.head_name}.weight", (spec.vocab_size, spec.hidden_size))
        tensors.append(_slice(spec, plan, head, key=f"{spec.embedding_name}.weight"))
    return ShardPlan(**{**plan.__dict__, "tensors": tuple(tensors)})


def _is_owned(spec: ModelSpec, plan: ShardPlan, name: str) -> bool:
    layer = spec.layer_of(name)
    if layer is not None:
        return plan.layers[0] <= layer < plan.layers[1]
    if name.startswith(spec.embedding_name + "."):
        return plan.has_embedding
    return plan.has_head  # the final norm and the head


def _slice(spec: ModelSpec, plan: ShardPlan, parameter: Parameter, key: str | None = None) -> TensorSlice:
    whole = tuple(((0, size),) for size in parameter.shape)
    style = spec.style_of(parameter.name)
    cut = _CUT_DIM[style] if style else None
    if cut is None or cut >= len(parameter.shape):  # a rowwise bias is whole: added once, after the all-reduce
        intervals = whole
    else:
        interval = _interval(spec, plan, parameter, parameter.shape[cut])
        intervals = (*whole[:cut], (interval,), *whole[cut + 1 :])
    return TensorSlice(parameter.name, key or parameter.name, parameter.shape, intervals)


def _interval(spec: ModelSpec, plan: ShardPlan, parameter: Parameter, size: int) -> Interval:
    """Which part of a cut dimension this rank holds, by the role of the module that the parameter belongs to."""
    module = parameter.name.rpartition(".")[0]
    units: dict[str, tuple[Interval, int]] = {
        "q_proj": (plan.heads, spec.head_dim),
        "o_proj": (plan.heads, spec.head_dim),
        "k_proj": (plan.kv_heads, spec.head_dim),
        "v_proj": (plan.kv_heads, spec.head_dim),
        "gate_proj": (plan.ffn_columns, 1),
        "up_proj": (plan.ffn_columns, 1),
        "down_proj": (plan.ffn_columns, 1),
        spec.head_name.rpartition(".")[2]: (plan.vocab_rows, 1),
        spec.embedding_name.rpartition(".")[2]: (plan.vocab_rows, 1),
    }
    role = module.rpartition(".")[2]
    if role not in units:
        raise UnsupportedModel(f"{spec.architecture}: no rule says how {parameter.name} of {size} is split")
    (first, end), unit = units[role]
    return first * unit, end * unit
