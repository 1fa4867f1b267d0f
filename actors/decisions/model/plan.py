"""The plan of one replica: everything that follows from its config and its model, decided before anything starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from actors.decisions.model.shard_plan import ShardPlan, check_given_cut, make_shard_plans
from actors.decisions.model.sizes import Sizes, broken_constraints
from actors.decisions.model.spec import ModelSpec
from actors.decisions.model.tp_plan import with_tp_plan
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.settings import SchedulerSettings
from actors.words.errors import UnsupportedModel
from cluster.topology import Topology
from configs.config import Config

DEFAULT_BLOCK_SIZE = 16  # tokens, where the device's backend names no other
_SHORTEST = 2  # tokens of a sequence: a prompt and an answer of one each


@dataclass(frozen=True)
class Plan:
    """What ranks and engine work by. It does not change, and `stagemesh plan` prints it."""

    spec: ModelSpec
    topology: Topology
    shards: tuple[ShardPlan, ...]  # in rank order
    max_model_len: int  # tokens: prompt + generated
    scheduler: SchedulerSettings
    is_length_asked: bool = True  # somebody set it, so that it is never lowered to what the KV cache holds

    @property
    def block_size(self) -> int:
        """Tokens of one block of the KV cache."""
        return self.scheduler.block_size

    @property
    def num_blocks_for_longest(self) -> int:
        """KV blocks that one sequence of `max_model_len` tokens holds."""
        return num_blocks_for(self.max_model_len, self.block_size)

    def fitted(self, num_blocks: int) -> "Plan":
        """The plan with a KV cache of `num_blocks` on every rank: it follows from both alone, the same on every rank.

        Where nobody asked for a length, `max_model_len` is lowered to what one sequence can have in the cache. Raises
        ValueError when the length that was asked for does not fit, or nothing does.
        """
        longest = num_blocks * self.block_size
        if self.is_length_asked or longest < _SHORTEST:
            _check_num_blocks(num_blocks, self.max_model_len, self.block_size)
        return replace(self, max_model_len=min(longest, self.max_model_len))

    def kv_bytes_per_block(self, rank: int) -> int:
        """Bytes of one block on a rank: keys and values of its layers and KV heads."""
        elements = sum(attention.cached_elements for attention in self.shards[rank].attentions)
        return self.block_size * elements * self.spec.dtype_bytes


def make_plan(config: Config, spec: ModelSpec, default_block_size: int = DEFAULT_BLOCK_SIZE) -> Plan:
    """Make the plan. `default_block_size`, in tokens, is the device's; it counts where the config names none.

    Raises ValueError, with a line for each wrong field (the reason, and what would work), or UnsupportedModel.
    """
    parallel, scheduler = config.parallel, config.scheduler
    topology = Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    block_size = config.cache.block_size or default_block_size
    problems = _problems(config, spec, topology, block_size)
    if problems:
        raise ValueError("\n".join(problems))
    spec = with_tp_plan(spec, parallel)
    return Plan(
        spec=spec,
        topology=topology,
        shards=make_shard_plans(spec, topology, parallel.layers_per_stage),
        max_model_len=config.model.max_model_len or spec.max_position,
        scheduler=SchedulerSettings(
            block_size=block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            num_lanes=scheduler.num_lanes or topology.pipeline_parallel_size,
            # A second step in flight hides the way to the engine and back. A lane more than there are stages would
            # hide it too, but makes every step smaller: the weights are read more often for the same tokens.
            depth=scheduler.depth or 2,
            prefix_cache=config.cache.prefix_cache,
        ),
        is_length_asked=config.model.max_model_len is not None,
    )


def _check_num_blocks(num_blocks: int, max_model_len: int, block_size: int) -> None:
    if num_blocks < (needed := num_blocks_for(max_model_len, block_size)):
        raise ValueError(
            f"cache.num_blocks: {num_blocks} blocks of {block_size} tokens do not hold one sequence of "
            f"model.max_model_len {max_model_len}; it takes {needed}. Lower model.max_model_len, or raise "
            "cache.num_blocks or cache.memory_share"
        )


def _problems(config: Config, spec: ModelSpec, topology: Topology, block_size: int) -> list[str]:
    """All that is wrong with the config for this model, a line each."""
    problems, scheduler = [], config.scheduler
    max_model_len = config.model.max_model_len or spec.max_position
    if max_model_len > spec.max_position:
        problems.append(
            f"model.max_model_len: {max_model_len} tokens, but the model knows positions up to {spec.max_position}; "
            f"use at most {spec.max_position}"
        )
    if config.cache.num_blocks is not None and config.model.max_model_len is not None:
        problems += _problem_of(_check_num_blocks, config.cache.num_blocks, max_model_len, block_size)
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        problems.append(
            f"scheduler.max_num_batched_tokens: a step of {scheduler.max_num_batched_tokens} tokens cannot hold one "
            f"token for each of scheduler.max_num_seqs = {scheduler.max_num_seqs} sequences; use at least as many"
        )
    if topology.pipeline_parallel_size > 1 and spec.exchanges_more:
        problems.append(
            f"parallel.pipeline_parallel_size: {spec.architecture} cannot be cut into stages: its layers get more than "
            "the hidden states of the layer before, such as an embedding for each layer; use 1"
        )
    try:
        spec = with_tp_plan(spec, config.parallel)
    except UnsupportedModel:
        raise
    except ValueError as error:
        problems.append(str(error))
    problems += broken_constraints(Sizes.of(spec), topology)
    return problems + _problem_of(check_given_cut, spec, topology, config.parallel.layers_per_stage)


def _problem_of(check: Callable[..., None], *arguments: object) -> list[str]:
    """The message of the ValueError that a check raises, if it does."""
    try:
        check(*arguments)
    except ValueError as error:
        return [str(error)]
    return []
