"""How many KV blocks a rank has room for: what is free, less what the largest step takes, which is run for that."""

import torch

from actors.decisions.schedule.buckets import most_captured_tokens
from actors.decisions.schedule.largest_step import largest_step
from actors.tensors.runner import Runner

_PROVISIONAL_BLOCKS = 1  # the largest step keeps all of its tokens in block 0


def num_blocks_that_fit(runner: Runner, memory_share: float, ranks_on_node: int) -> int:
    """Blocks that fit into `memory_share` of what is left; 0 where nothing is. All ranks call it at the same time.

    Raises ValueError where the largest step has no room beside the weights.
    """
    plan, backend = runner.plan, runner.backend

    def run(num_tokens: int) -> None:
        for lane in range(plan.scheduler.num_lanes):  # what one has sent is kept until it sends again
            for step in largest_step(plan.scheduler, plan.max_model_len, num_tokens, lane):
                runner.execute(step)

    runner.put_cache(_PROVISIONAL_BLOCKS)
    try:
        settings = plan.scheduler
        peak_bytes = backend.peak_bytes(run, settings.max_num_batched_tokens, most_captured_tokens(settings))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"scheduler.max_num_batched_tokens: a step of {plan.scheduler.max_num_batched_tokens} tokens has no room "
            "beside the weights; lower it, or scheduler.max_num_seqs, or use more shards or stages"
        ) from error
    finally:
        runner.drop_cache()
    left_bytes = backend.free_bytes(ranks_on_node) - peak_bytes
    num_blocks = int(left_bytes * memory_share) // plan.kv_bytes_per_block(runner.shard.rank)
    return max(0, num_blocks - backend.num_padding_blocks)
