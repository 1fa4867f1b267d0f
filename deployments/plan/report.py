"""What `stagemesh plan` says, as data with units in the names: made from a Plan and an Estimate."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from actors.decisions.model.accelerators import Accelerator
from actors.decisions.model.estimate import (
    ASSUMPTIONS,
    Estimate,
    Memory,
    Speed,
    ffn_columns,
    kv_bytes_per_token,
    latent_bytes_per_token,
)
from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.shard_plan import Interval
from actors.decisions.model.sizes import Sizes, valid_tensor_parallel_sizes
from actors.decisions.model.spec import ModelSpec
from cluster.topology import Topology
from configs.config import Config

BATCHES = (1, 8, 64)
_GPUS_OF_A_NODE = 8
_MOST_STAGES = 16


@dataclass(frozen=True)
class RankRow:
    """One rank; intervals are [first, end) in the unsharded model's numbering."""

    rank: int
    node: int  # the stage's: a stage never spans nodes
    stage: int
    shard: int
    layers: Interval
    heads: int
    kv_heads: int
    ffn_columns: int
    vocabulary_rows: int
    weight_bytes: int
    memory: Memory


@dataclass(frozen=True)
class Layout:
    """One way to cut the model, on the same accelerator."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    gpus: int
    fits: bool
    longest_context: int
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class PlanReport:
    """Everything that `stagemesh plan` prints."""

    architecture: str
    source: str  # where the architecture was read
    accelerator: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    parameters: int
    fp32_weight_bytes: int
    bf16_weight_bytes: int
    planned_weight_bytes: int  # of all ranks together, copies counted
    dtype: str
    max_position: int  # tokens that the model knows
    max_model_len: int  # tokens of the longest request; where nobody asked for a length, what the cache holds
    kv_bytes_per_token: int  # of all ranks together
    kv_bytes_per_token_by_rank: tuple[int, ...]
    latent_kv_bytes_per_token: int | None  # what latent attention would take unexpanded
    has_windows: bool
    all_reduces_per_step: int
    all_reduce_bytes_per_token: int
    hop_bytes_per_token: int
    num_blocks: int
    block_size: int
    longest_context: int
    ranks: tuple[RankRow, ...]
    context: int  # tokens of each sequence in `decode`
    decode: tuple[Speed, ...]
    prefill_tokens_per_s: float
    assumptions: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what was read otherwise than config.json says, or assumed
    layouts: tuple[Layout, ...] = ()
    problems: tuple[str, ...] = ()


def make_report(config: Config, plan: Plan, accelerator: Accelerator, context: int, source: str) -> PlanReport:
    """The report of one plan, still without `layouts` and `problems`."""
    estimate = _estimate(config, plan, accelerator)
    spec, ranks = plan.spec, range(plan.topology.num_ranks)
    parameters = sum(parameter.numel for parameter in spec.parameters)
    num_blocks = estimate.num_blocks
    return PlanReport(
        architecture=spec.architecture,
        source=source,
        accelerator=accelerator.name,
        tensor_parallel_size=plan.topology.tensor_parallel_size,
        pipeline_parallel_size=plan.topology.pipeline_parallel_size,
        parameters=parameters,
        fp32_weight_bytes=4 * parameters,
        bf16_weight_bytes=2 * parameters,
        planned_weight_bytes=sum(shard.weight_bytes for shard in plan.shards),
        dtype=spec.dtype,
        max_position=spec.max_position,
        max_model_len=plan.max_model_len,
        kv_bytes_per_token=kv_bytes_per_token(plan),
        kv_bytes_per_token_by_rank=tuple(kv_bytes_per_token(plan, rank) for rank in ranks),
        latent_kv_bytes_per_token=latent_bytes_per_token(plan),
        has_windows=any(one.mask_spec.window or one.mask_spec.chunk for one in spec.attentions),
        all_reduces_per_step=estimate.all_reduces,
        all_reduce_bytes_per_token=estimate.all_reduce_bytes_per_token,
        hop_bytes_per_token=estimate.hop_bytes_per_token if plan.topology.pipeline_parallel_size > 1 else 0,
        num_blocks=num_blocks,
        block_size=plan.block_size,
        longest_context=min(plan.max_model_len, num_blocks * plan.block_size),
        ranks=tuple(_row(plan, estimate, rank) for rank in ranks),
        context=context,
        decode=tuple(estimate.decode(batch, context) for batch in BATCHES),
        prefill_tokens_per_s=estimate.prefill_tokens_per_s(),
        assumptions=ASSUMPTIONS,
        notes=(*spec.notes, *_notes(config, plan, parameters)),
    )


def _notes(config: Config, plan: Plan, parameters: int) -> list[str]:
    """What was decided without being asked for."""
    notes = []
    if config.model.dtype == "auto" and plan.spec.dtype == "float32":
        notes.append(
            f"the checkpoint's dtype is float32: {4 * parameters / 1e9:.1f} GB of weights; in bfloat16 it would be "
            f"{2 * parameters / 1e9:.1f} GB: set model.dtype, or ask with --dtype bfloat16"
        )
    if plan.max_model_len < plan.spec.max_position and not plan.is_length_asked:
        notes.append(
            f"the model knows {plan.spec.max_position} positions, but the cache holds {plan.max_model_len} tokens: no "
            "request can be longer; set model.max_model_len, or ask with --max-model-len, where it must be"
        )
    return notes


def fitted(config: Config, plan: Plan, accelerator: Accelerator) -> Plan:
    """The plan with the longest requests that an accelerator has room for, where nobody asked for a length."""
    num_blocks = _estimate(config, plan, accelerator).num_blocks
    return plan.fitted(num_blocks) if num_blocks and not plan.is_length_asked else plan


def _estimate(config: Config, plan: Plan, accelerator: Accelerator) -> Estimate:
    return Estimate(plan, accelerator, config.cache.memory_share, config.cache.num_blocks)


def _row(plan: Plan, estimate: Estimate, rank: int) -> RankRow:
    shard = plan.shards[rank]
    first, end = shard.vocab_rows
    attention = max(shard.attentions, key=lambda one: one.num_heads, default=None)
    return RankRow(
        rank=rank,
        node=shard.stage,
        stage=shard.stage,
        shard=shard.shard,
        layers=shard.layers,
        heads=attention.num_heads if attention else 0,
        kv_heads=attention.num_kv_heads if attention else 0,
        ffn_columns=ffn_columns(plan, shard),
        vocabulary_rows=end - first if shard.has_embedding or shard.has_head else 0,
        weight_bytes=shard.weight_bytes,
        memory=estimate.memory(rank),
    )


def shortfalls(config: Config, plan: Plan, accelerator: Accelerator) -> tuple[str, ...]:
    """Why the plan does not fit into the accelerator's memory; empty when it does."""
    estimate = _estimate(config, plan, accelerator)
    memories = [estimate.memory(rank) for rank in range(plan.topology.num_ranks)]
    problems = []
    fullest = max(range(len(memories)), key=lambda rank: memories[rank].weight_bytes)
    if memories[fullest].cache_bytes <= 0:
        needed = memories[fullest].weight_bytes + memories[fullest].activation_bytes
        problems.append(
            f"rank {fullest} needs {needed / 1e9:.1f} GB for weights and activations, and a {accelerator.name} has "
            f"{accelerator.memory_bytes / 1e9:.0f} GB; use more shards or stages"
        )
    elif config.cache.num_blocks is None and not estimate.fits():
        tokens = estimate.num_blocks * plan.block_size
        problems.append(
            f"model.max_model_len: {plan.max_model_len} tokens do not fit: the cache holds {tokens}; lower it, raise "
            "cache.memory_share, or use more shards or stages"
        )
    elif config.cache.num_blocks is not None and config.cache.num_blocks > estimate.num_blocks_that_fit:
        problems.append(
            f"cache.num_blocks: {config.cache.num_blocks} blocks do not fit; {estimate.num_blocks_that_fit} do on a "
            f"{accelerator.name}"
        )
    return tuple(problems)


def layouts(
    config: Config, spec: ModelSpec, accelerator: Accelerator, context: int, block_size: int
) -> tuple[Layout, ...]:
    """Every valid TP × PP of as many GPUs as asked for, and the fewest that would do; the fastest at batch 64 first.

    More GPUs than a node has come as whole nodes.
    """
    asked = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    by_gpus: dict[int, list[Topology]] = {}
    for tp in valid_tensor_parallel_sizes(Sizes.of(spec)):
        for pp in range(1, min(spec.num_layers, _MOST_STAGES) + 1):
            is_whole = tp * pp <= _GPUS_OF_A_NODE or tp * pp % _GPUS_OF_A_NODE == 0 or tp * pp == asked
            if tp <= _GPUS_OF_A_NODE and is_whole:
                by_gpus.setdefault(tp * pp, []).append(Topology(tp, pp))
    weight_bytes = sum(parameter.numel for parameter in spec.parameters) * spec.dtype_bytes
    found: list[Layout] = []
    for gpus in sorted(by_gpus):
        is_enough = any(one.fits for one in found)
        if gpus == asked or (not is_enough and gpus * accelerator.memory_bytes > weight_bytes):
            found += [
                one
                for topology in by_gpus[gpus]
                for one in _layout(config, spec, accelerator, context, topology, block_size)
            ]
    shown = [one for one in found if one.gpus == asked or one.fits]
    return tuple(sorted(shown, key=lambda one: (not one.fits, -one.speeds[-1].tokens_per_s / one.gpus)))


def _layout(
    config: Config, spec: ModelSpec, accelerator: Accelerator, context: int, topology: Topology, block_size: int
) -> list[Layout]:
    """The layout of a topology; an empty list when the model cannot be cut so."""
    sizes = {
        "tensor_parallel_size": topology.tensor_parallel_size,
        "pipeline_parallel_size": topology.pipeline_parallel_size,
        "layers_per_stage": None,
    }
    parts: dict[str, Any] = {**config.model_dump(), "parallel": {**config.parallel.model_dump(), **sizes}}
    try:
        plan = fitted(config, make_plan(Config.model_validate(parts), spec, block_size), accelerator)
    except ValueError:
        return []
    estimate = _estimate(config, plan, accelerator)
    longest = min(plan.max_model_len, estimate.num_blocks * plan.block_size)
    speeds = tuple(estimate.decode(batch, context) for batch in BATCHES)
    return [
        Layout(
            **dataclasses.asdict(topology),
            gpus=topology.num_ranks,
            fits=estimate.fits() and plan.max_model_len >= context,
            longest_context=longest,
            speeds=speeds,
        )
    ]
