"""Decode steps of one rank at several batches, beside the time that its bytes take at the bandwidth measured here."""

import time
from collections import deque
from typing import Any, NamedTuple

import torch

from actors.decisions.model.plan import Plan
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, StepBatch
from gpu_stages.measure import bandwidth, kernels
from gpu_stages.random_model import GREEDY, capture, plan_of, random_runner, weight_bytes_read
from gpu_stages.stages import CONTEXT, Job

NUM_WARM_UP = 5
PROFILED_STEPS = 4


class Sizes(NamedTuple):
    shape: str
    batches: tuple[int, ...]
    context: int
    num_steps: int
    profiled: tuple[int, ...]  # batches whose kernels are shown
    dtype: str = "bfloat16"


TINY = Sizes("tiny", (1, 3), 40, 3, (3,), "float32")


def run_8b(job: Job) -> None:
    measure(job, TINY if job.is_tiny else Sizes("llama8b", (1, 8, 64, 256), CONTEXT, 48, (1, 64)), num_shards=1)


def run_70b(job: Job) -> None:
    """All-reduces do nothing here: what they take comes on top."""
    sizes = TINY if job.is_tiny else Sizes("llama70b", (1, 8, 64, 256), CONTEXT, 48, (1, 64))
    measure(job, sizes, num_shards=8)


def measure(job: Job, sizes: Sizes, num_shards: int) -> None:
    device = torch.device(job.device)
    rate, began = bandwidth(device), time.perf_counter()
    longest = sizes.context + NUM_WARM_UP + sizes.num_steps + PROFILED_STEPS + 2
    batch = max(sizes.batches)
    plan = plan_of(sizes.shape, sizes.dtype, num_shards, max_model_len=longest, max_num_seqs=batch)
    runner = random_runner(plan, device, batch * plan.num_blocks_for_longest, sizes.shape)
    for tensor in runner.cache.tensors:  # zeros would take less power
        tensor.normal_()
    job.record(
        bandwidth_gb_per_s=rate / 1e9,
        start_s=time.perf_counter() - began,
        num_all_reduces=2 * len(runner.shard.attentions) + 1 if num_shards > 1 else 0,
        substitutions={one.what: one.count for one in runner.substitutions},
    )
    capture(runner, *[[Entry(seq, sizes.context, [], [], True) for seq in range(batch)] for batch in sizes.batches])
    for batch in sizes.batches:
        sequences = Sequences(runner, batch, sizes.context)
        ms = 1000 * sequences.step_s(sizes.num_steps)
        num_bytes = bytes_of_a_step(plan, batch, sizes.context + NUM_WARM_UP + sizes.num_steps / 2)
        limit_ms = 1000 * num_bytes / rate
        found: dict[str, Any] = {"batch": batch, "ms": ms, "limit_ms": limit_ms, "share_of_limit": limit_ms / ms}
        job.record(**found, tokens_per_s=1000 * batch / ms)
        if batch in sizes.profiled:
            rows, is_captured = kernels(device, lambda: sequences.steps(PROFILED_STEPS), PROFILED_STEPS)  # noqa: B023
            job.record(batch=batch, is_captured=is_captured, kernels=rows)
        sequences.close()


def bytes_of_a_step(plan: Plan, batch: int, context: float) -> float:
    """What a decode step of shard 0 must read: every weight but the embedding, keys and values of all contexts."""
    return weight_bytes_read(plan, 0) + batch * context * plan.kv_bytes_per_block(0) / plan.block_size


class Sequences:
    """Sequences with contexts that were computed before, as those of a cached prefix; all decode in each step."""

    def __init__(self, runner: Runner, batch: int, context: int) -> None:
        self._runner, self._batch, self._position = runner, batch, context - 1
        per_sequence, vocab_size = runner.plan.num_blocks_for_longest, runner.plan.spec.vocab_size
        ids = torch.randint(vocab_size, (batch, context), generator=torch.Generator().manual_seed(batch)).tolist()
        opened = [NewSequence(seq, GREEDY, ids[seq][:-1], context) for seq in range(batch)]
        entries = [
            Entry(seq, context - 1, ids[seq][-1:], list(range(seq * per_sequence, (seq + 1) * per_sequence)), True)
            for seq in range(batch)
        ]
        runner.execute(StepBatch(0, 0, 0, opened, [], entries))
        self.steps(NUM_WARM_UP)

    def steps(self, num_steps: int) -> None:
        """Two steps in flight, as the engine has them."""
        launched: deque[Any] = deque()
        for _ in range(num_steps):
            self._position += 1
            entries = [Entry(seq, self._position, [], [], True) for seq in range(self._batch)]
            launched.append(self._runner.launch(StepBatch(0, self._position, 0, [], [], entries)))
            if len(launched) > 1:
                launched.popleft().take()
        while launched:
            launched.popleft().take()

    def step_s(self, num_steps: int) -> float:
        """Of one step: the mean over all, since waiting moves between them."""
        began = time.perf_counter()
        self.steps(num_steps)
        return (time.perf_counter() - began) / num_steps

    def close(self) -> None:
        self._runner.execute(StepBatch(0, 0, 0, [], list(range(self._batch)), []))
