"""Estimates what a plan costs and how fast it will be: memory of each rank, bytes exchanged, and the time of a step.

It is arithmetic on a Plan: what a step reads or computes, whichever takes longer, and a cost of each launch and each
exchange on top. Time of the host is not in it.
"""

from dataclasses import dataclass
from functools import cached_property

from actors.decisions.model.accelerators import Accelerator
from actors.decisions.model.launches import LAUNCH_S, OF_A_STEP, launches_of_a_layer
from actors.decisions.model.memory import RESERVED_BYTES, beside_cache_bytes
from actors.decisions.model.plan import Plan
from actors.decisions.model.shard_plan import ShardPlan, TensorSlice
from actors.decisions.model.spec import Parameter, dtype_bytes, pattern_of
from actors.decisions.schedule.blocks import num_blocks_for
from cluster.collectives.methods import StageLinks, all_reduce_s

# Of the data sheet's bandwidth: an H100 copies at 0.89 of it (measured), and products of few rows reach 0.88 of that
REACHED = 0.78
HOP_S = 20e-6  # latency of a hop between two nodes
_SUMMED = ("rowwise", "rowwise_split_input", "moe_tp_experts", "all_reduce")

ASSUMPTIONS = (
    "a step reads every weight that it uses once, and the keys and values of all its sequences once",
    f"memory is read at {REACHED:.0%} of the data sheet's rate, and arithmetic at all of it",
    f"a launch costs {LAUNCH_S * 1e6:.1f} µs beside its work, in a CUDA graph; no host time",
    "an all-reduce takes 7 to 15 µs, by its method, and its bytes' time on the node's links",
    f"a hop between stages takes {HOP_S * 1e6:.0f} µs and one network port a GPU",
    "a batch is spread over as many lanes as there are stages",
    "experts are hit evenly and independently",
    f"{RESERVED_BYTES / 1e9:.1f} GB of a GPU are its driver's, its context's and the communicators'",
    "the largest step asks for penalties, top_p and log-probabilities in every row",
)


@dataclass(frozen=True)
class Speed:
    """Of decoding one batch at one context length."""

    batch: int
    ms_per_token: float  # from one token of a sequence to its next
    tokens_per_s: float  # of all sequences together
    limited_by: str
    running: int  # sequences that the cache and the scheduler let run at a time: at most the batch, 0 where none fits


@dataclass(frozen=True)
class Memory:
    """Of one rank, on one accelerator, in bytes."""

    weight_bytes: int
    activation_bytes: int  # of the largest step, and what graphs keep
    cache_bytes: int  # what is left for keys and values; negative when not even the weights fit
    num_blocks: int
    longest_context: int  # tokens of one sequence that fit, at most max_model_len


class Estimate:
    """The cost and speed of a plan on one kind of accelerator."""

    def __init__(
        self, plan: Plan, accelerator: Accelerator, memory_share: float, num_blocks: int | None = None
    ) -> None:
        """`num_blocks`: of the KV cache, where the config fixes it; None where the memory decides."""
        self.plan = plan
        self.accelerator = accelerator
        self.memory_share = memory_share
        self.num_blocks_asked = num_blocks
        self._memories: dict[int, Memory] = {}  # by rank

    def memory(self, rank: int) -> Memory:
        """The memory of a rank, divided as ranks do once they have measured their largest step."""
        if rank not in self._memories:
            self._memories[rank] = self._memory(rank)
        return self._memories[rank]

    def _memory(self, rank: int) -> Memory:
        shard, plan = self.plan.shards[rank], self.plan
        beside = beside_cache_bytes(plan, rank)
        free = self.accelerator.memory_bytes - RESERVED_BYTES - shard.weight_bytes - beside
        cache = int(free * self.memory_share) if free > 0 else free
        num_blocks = max(0, cache // max(1, plan.kv_bytes_per_block(rank)))
        longest = min(plan.max_model_len, num_blocks * plan.block_size)
        return Memory(shard.weight_bytes, beside, cache, num_blocks, longest)

    @cached_property
    def num_blocks_that_fit(self) -> int:
        """KV blocks that fit on every rank."""
        return min(self.memory(rank).num_blocks for rank in range(self.plan.topology.num_ranks))

    @property
    def num_blocks(self) -> int:
        """KV blocks of every rank."""
        return self.num_blocks_asked or self.num_blocks_that_fit

    def fits(self) -> bool:
        """Whether a sequence of full length and the blocks that the config asks for have room."""
        return self.num_blocks_that_fit >= max(self.plan.num_blocks_for_longest, self.num_blocks_asked or 0)

    @cached_property
    def all_reduces(self) -> int:
        """The number of all-reduces in one step: of all layers of all stages, and of the embedding."""
        spec = self.plan.spec
        if self.plan.topology.tensor_parallel_size == 1:
            return 0
        modules = {parameter.name.rpartition(".")[0] for parameter in spec.parameters}
        owners = {name.rpartition(".")[0] for name in modules} | modules
        return 1 + sum(
            spec.styles.get(pattern_of(name)) in _SUMMED for name in owners if spec.layer_of(name) is not None
        )

    @property
    def all_reduce_bytes_per_token(self) -> int:
        """Bytes that one all-reduce sums for each token."""
        return self.plan.spec.hidden_size * self.plan.spec.dtype_bytes

    @property
    def hop_bytes_per_token(self) -> int:
        """Bytes that one stage sends to the next for each token."""
        numel = 1
        for size in self.plan.spec.state_shape:
            numel *= size
        return numel * self.plan.spec.dtype_bytes

    def decode(self, batch: int, context: int) -> Speed:
        """The speed of decoding `batch` sequences of `context` tokens, or as many of them as may run at a time."""
        num_stages = self.plan.topology.pipeline_parallel_size
        room = min(self.plan.scheduler.max_num_seqs, self.num_blocks // num_blocks_for(context, self.plan.block_size))
        running = min(batch, room) if self.fits() else 0
        if not running:
            return Speed(batch, 0.0, 0.0, "does not fit", 0)
        lane = -(-running // num_stages)  # the fullest
        stages = [self._stage_s(stage, lane, lane * context) for stage in range(num_stages)]
        seconds = sum(sum(parts.values()) for parts in stages)
        totals = {name: sum(parts[name] for parts in stages) for name in stages[0]}
        slowest = max(sum(parts.values()) for parts in stages)
        rate = running / max(seconds, -(-running // lane) * slowest)
        limit = max(totals, key=lambda name: totals[name])
        return Speed(batch, seconds * 1e3, rate, limit, running)

    def prefill_tokens_per_s(self) -> float:
        """Tokens of long prompts a second, in steps of max_num_batched_tokens, through the slowest stage."""
        tokens = self.plan.scheduler.max_num_batched_tokens
        num_stages = self.plan.topology.pipeline_parallel_size
        pairs = tokens * (tokens + 1) // 2  # each token attends to those before it and to itself
        return tokens / max(sum(self._stage_s(stage, tokens, tokens, pairs).values()) for stage in range(num_stages))

    def _stage_s(self, stage: int, tokens: int, cached_tokens: int, pairs: int | None = None) -> dict[str, float]:
        """Seconds of one step in one stage, by cause. `pairs` of query and key; None: one for each cached token."""
        topology, device = self.plan.topology, self.accelerator
        shard = self.plan.shards[topology.rank(stage, 0)]
        weight_bytes, active_elements = 0.0, 0.0
        for tensor in shard.tensors:
            read, used = self._use_of_experts(tensor, tokens)
            if not self._is_lookup(tensor):
                weight_bytes += read * tensor.num_bytes
                active_elements += used * tensor.num_bytes / dtype_bytes(tensor.dtype)
        elements = sum(attention.cached_elements for attention in shard.attentions)
        cache_bytes = cached_tokens * elements * self.plan.spec.dtype_bytes
        heads = sum(one.num_heads * (one.spec.key_dim + one.spec.value_dim) for one in shard.attentions)
        flop = 2 * tokens * active_elements + 2 * (cached_tokens if pairs is None else pairs) * heads
        memory_s = (weight_bytes + cache_bytes) / (device.memory_bytes_per_s * REACHED)
        compute_s = flop / device.bf16_flop_per_s
        links = StageLinks(topology.tensor_parallel_size, device.maps_neighbors, device.has_adding_switch)
        one_s = all_reduce_s(tokens * self.all_reduce_bytes_per_token, links, device.link_bytes_per_s)
        is_last = stage == topology.pipeline_parallel_size - 1
        sent = tokens * self.hop_bytes_per_token / links.num_shards
        launches = shard.num_layers * launches_of_a_layer(self.plan.spec) + (OF_A_STEP if is_last else 0)
        return {
            "memory bandwidth": memory_s if memory_s >= compute_s else 0.0,
            "arithmetic": compute_s if compute_s > memory_s else 0.0,
            "launches": launches * LAUNCH_S,
            "all-reduces": self.all_reduces / topology.pipeline_parallel_size * one_s,
            "hops between stages": 0.0 if is_last else HOP_S + sent / device.nic_bytes_per_s,
        }

    def _use_of_experts(self, tensor: TensorSlice, tokens: int) -> tuple[float, float]:
        """(share of a tensor that a step reads, share that one token uses): less than all for stacked experts."""
        if not self._is_stacked(tensor):
            return 1.0, 1.0
        assert self.plan.spec.experts_per_token is not None
        used = self.plan.spec.experts_per_token / tensor.full_shape[0]
        return 1 - (1 - used) ** tokens, used

    def _is_stacked(self, tensor: TensorSlice) -> bool:
        """Whether a tensor holds several experts, of which a token uses some."""
        has_experts = self.plan.spec.experts_per_token is not None and self._is_in_layer(tensor)
        return has_experts and len(tensor.full_shape) == 3

    def _is_in_layer(self, tensor: TensorSlice) -> bool:
        return self.plan.spec.layer_of(tensor.name) is not None

    def _is_lookup(self, tensor: TensorSlice) -> bool:
        """Whether a token reads only one row of it: an embedding that is not the head's weight too."""
        spec = self.plan.spec
        is_embedding = tensor.name == f"{spec.embedding_name}.weight"
        return is_embedding and not any(shard.shares_tied_weight for shard in self.plan.shards)


def kv_bytes_per_token(plan: Plan, rank: int | None = None) -> int:
    """Bytes of the KV cache for one token, on one rank or on all together."""
    ranks = range(plan.topology.num_ranks) if rank is None else [rank]
    return sum(plan.kv_bytes_per_block(one) for one in ranks) // plan.block_size


def latent_bytes_per_token(plan: Plan) -> int | None:
    """Bytes that latent attention would cache for one token without expanding to heads; None for other attention."""
    latent = [one for one in plan.spec.parameters if one.name.endswith("kv_a_proj_with_mqa.weight")]
    return sum(one.shape[0] for one in latent) * plan.spec.dtype_bytes if latent else None


def ffn_columns(plan: Plan, shard: ShardPlan) -> int:
    """Columns of the widest feed-forward network in a rank's first layer."""
    spec = plan.spec
    own = {tensor.name: tensor for tensor in shard.tensors}
    beside_attention = [
        parameter
        for parameter in spec.parameters
        if spec.layer_of(parameter.name) == shard.layers[0] and spec.attention_of(parameter.name) is None
    ]
    return max((_cut_columns(plan, one, own[one.name]) for one in beside_attention), default=0)


def _cut_columns(plan: Plan, parameter: Parameter, tensor: TensorSlice) -> int:
    whole = plan.spec.columns_of(parameter)
    if whole is None:
        return 0
    cut = [held / full for held, full in zip(tensor.shape, tensor.full_shape, strict=True) if held != full]
    return round(whole * (cut[0] if cut else 1))
