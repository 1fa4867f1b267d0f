"""A gang of threads: every rank's Runner in one process, with groups and links made of barriers and queues.

Groups of processes have their own tests; here only what each rank computes is in question.
"""

import queue
import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from actors.decisions.plan import Plan
from actors.tensors.batch import StepTensors
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch

CPU = torch.device("cpu")
WAIT_S = 20.0
GREEDY = SamplingParams(temperature=0)


class Shards:
    """What the shards of one stage share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadGroup:
    """One shard's view of its stage."""

    def __init__(self, shared: Shards, shard: int) -> None:
        self.shared, self.shard, self.size = shared, shard, len(shared.parts)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(tensor)
        return torch.stack(parts).sum(0) if self.size > 1 else tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor))

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.shared.parts[self.shard] = tensor.clone()
        self.shared.barrier.wait(WAIT_S)
        parts = list(self.shared.parts)
        self.shared.barrier.wait(WAIT_S)
        return parts

    def abort(self) -> None:
        self.shared.barrier.abort()

    def close(self) -> None: ...


class Sent:
    def wait(self) -> None: ...


class ThreadLink:
    def __init__(self) -> None:
        self.queue: queue.Queue[torch.Tensor] = queue.Queue()

    def send(self, tensor: torch.Tensor) -> Sent:
        self.queue.put(tensor.clone())
        return Sent()

    def receive(self, tensor: torch.Tensor) -> None:
        sent = self.queue.get(timeout=WAIT_S)
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)


class Neighbours:
    feedback = None

    def __init__(self, stage: ThreadGroup, previous: ThreadLink | None, following: ThreadLink | None) -> None:
        self.stage, self.previous, self.next = stage, previous, following


class RecordingRunner(Runner):
    """Remembers the last step's output: logits on the last stage."""

    output: torch.Tensor

    def forward(self, tensors: StepTensors) -> torch.Tensor:
        self.output = super().forward(tensors)
        return self.output


class ThreadGang:
    """All ranks of a plan (of depth 1), loaded from a folder."""

    def __init__(self, plan: Plan, folder: Path, num_blocks: int) -> None:
        topology = plan.topology
        tp, pp = topology.tensor_parallel_size, topology.pipeline_parallel_size
        self.plan, self.num_blocks = plan, num_blocks
        self.shared = [Shards(tp) for _ in range(pp)]
        links = [[None, *(ThreadLink() for _ in range(pp - 1)), None] for _ in range(tp)]
        self.runners = []
        for rank in range(topology.num_ranks):
            stage, shard = topology.stage(rank), topology.shard(rank)
            group = ThreadGroup(self.shared[stage], shard)
            neighbours = Neighbours(group, links[shard][stage], links[shard][stage + 1])
            self.runners.append(RecordingRunner(plan, rank, neighbours, CPU))
        self.reports = [runner.load(folder) for runner in self.runners]  # building patches torch: one at a time
        self._all(lambda runner: runner.allocate_cache(num_blocks))

    def execute(self, step: StepBatch) -> tuple[list[list[int]], torch.Tensor]:
        """Ids, which all shards of the last stage agree on, and the logits [rows, vocabulary]."""
        results = [sampled for sampled in self._all(lambda runner: runner.execute(step)) if sampled is not None]
        tp = self.plan.topology.tensor_parallel_size
        assert len(results) == tp
        assert all(result == results[0] for result in results)
        return results[0].token_ids, torch.cat([runner.output for runner in self.runners[-tp:]], dim=1)

    def _all(self, work: Callable[[RecordingRunner], Any]) -> list[Any]:
        """On every rank at once; the first error of any."""
        with ThreadPoolExecutor(len(self.runners)) as threads:
            futures = [threads.submit(self._one, work, runner) for runner in self.runners]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError | queue.Empty)):
            raise error
        return [future.result() for future in futures]

    def _one(self, work: Callable[[RecordingRunner], Any], runner: RecordingRunner) -> Any:
        torch.set_num_threads(1)
        try:
            return work(runner)
        except BaseException:
            for shared in self.shared:
                shared.barrier.abort()
            raise

    def generate(
        self, prompts: Iterable[list[int]], num_new: int, seed: int = 0
    ) -> list[tuple[list[int], torch.Tensor]]:
        """All prompts in one batch, in chunks of random size → (new ids, their logits [new, vocabulary]) of each."""
        chance, known = random.Random(seed), [list(prompt) for prompt in prompts]
        free, blocks, done = list(range(self.num_blocks)), [0] * len(known), [0] * len(known)
        ends = [len(ids) + num_new for ids in known]
        logits: list[list[torch.Tensor]] = [[] for _ in known]
        opened = [NewSequence(seq, GREEDY, []) for seq in range(len(known))]
        while any(len(ids) < end for ids, end in zip(known, ends, strict=True)):
            entries = []
            for seq, ids in enumerate(known):
                if len(ids) == ends[seq]:
                    continue
                count = min(len(ids) - done[seq], chance.choice((1, 3, 9, 100)))
                end = done[seq] + count
                fresh = -(-end // self.plan.block_size) - blocks[seq]
                blocks[seq] += fresh
                taken = [free.pop(chance.randrange(len(free))) for _ in range(fresh)]
                entries.append(Entry(seq, done[seq], ids[done[seq] : end], taken, sample=end == len(ids)))
                done[seq] = end
            step = StepBatch(0, 0, 0, opened, [], entries)
            opened = []
            token_ids, rows = self.execute(step)
            sampling = [entry.seq for entry in entries if entry.sample]
            for seq, new_ids, row in zip(sampling, token_ids, rows, strict=True):
                known[seq] += new_ids
                logits[seq].append(row)
        return [(ids[-num_new:], torch.stack(rows)) for ids, rows in zip(known, logits, strict=True)]
