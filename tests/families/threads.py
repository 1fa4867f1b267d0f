"""A gang of threads: every rank's Runner in one process, with groups and links made of barriers and queues.

Groups of processes have their own tests; here only what each rank computes is in question.
"""

import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from actors.tensors.backend import Backend
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.runner import Runner
from actors.tensors.sequence_table import StepTensors
from actors.words.messages import Event, Request, SamplingParams, StepBatch, StepResult
from cluster.collectives.interface import LoneShard, StageGroup

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


class Neighbors:
    feedback = None

    def __init__(self, stage: StageGroup, previous: ThreadLink | None, following: ThreadLink | None) -> None:
        self.stage, self.previous, self.next = stage, previous, following


class RecordingRunner(Runner):
    """Remembers the last step's output: logits on the last stage."""

    output: torch.Tensor

    def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
        self.output = super().forward(tensors, state)
        return self.output


class ThreadGang:
    """All ranks of a plan, loaded from a folder; one step of a lane in flight: threads have no feedback link."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        num_blocks: int,
        backend: Backend | None = None,
        runner_class: Callable[..., Any] = RecordingRunner,
        substitutes: bool = True,
    ) -> None:
        plan = dataclasses.replace(plan, scheduler=dataclasses.replace(plan.scheduler, depth=1))
        topology = plan.topology
        tp, pp = topology.tensor_parallel_size, topology.pipeline_parallel_size
        self.plan, self.num_blocks = plan, num_blocks
        self.shared = [Shards(tp) for _ in range(pp)]
        links = [[None, *(ThreadLink() for _ in range(pp - 1)), None] for _ in range(tp)]
        self.runners = []
        for rank in range(topology.num_ranks):
            stage, shard = topology.stage(rank), topology.shard(rank)
            group = ThreadGroup(self.shared[stage], shard) if tp > 1 else LoneShard()
            neighbors = Neighbors(group, links[shard][stage], links[shard][stage + 1])
            self.runners.append(runner_class(plan, rank, neighbors, backend or CPUBackend(CPU)))
        # Building patches torch: one at a time
        self.reports = [runner.load(folder, substitutes=substitutes) for runner in self.runners]
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


class ThreadExecutor:
    """Lets an engine drive a gang of threads: a step is executed where it is submitted. Remembers the logits."""

    shapes = ()

    def __init__(self, gang: ThreadGang) -> None:
        self.gang = gang
        self.logits: dict[int, list[torch.Tensor]] = {}  # by sequence: of every id that was sampled
        self._results: deque[StepResult] = deque()
        self._changed = threading.Condition()
        self._woken = False

    def submit(self, step: StepBatch) -> None:
        if step.entries:
            token_ids, logits = self.gang.execute(step)
            for entry, row in zip([entry for entry in step.entries if entry.sample], logits, strict=True):
                self.logits.setdefault(entry.seq, []).append(row)
            with self._changed:
                self._results.append(StepResult(step.epoch, step.step, token_ids))
                self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._woken, timeout_s)
            self._woken = False
            results = list(self._results)
            self._results.clear()
            return results

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None: ...


def serve(gang: ThreadGang, prompts: list[list[int]], num_new: int) -> list[tuple[list[int], torch.Tensor]]:
    """All prompts at once through an engine, in chunks → (new ids, their logits [new, vocabulary]) of each."""
    plan, executor = gang.plan, ThreadExecutor(gang)
    ids: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    ended, waiting = threading.Event(), set(ids)
    errors: list[str] = []

    def take(events: list[Event]) -> None:
        for event in events:
            ids[event.request_id] += event.token_ids
            if event.finish_reason:
                errors.extend([event.error] if event.error else [])
                waiting.discard(event.request_id)
        if not waiting:
            ended.set()

    settings = SchedulerSettings(
        block_size=plan.block_size,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=9,
        num_lanes=plan.scheduler.num_lanes,
        depth=plan.scheduler.depth,
    )
    engine = Engine(executor, settings, gang.num_blocks, take)
    engine.start()
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, num_new, GREEDY))
    assert ended.wait(WAIT_S), f"requests {waiting} did not end"
    engine.close()
    assert not errors, errors
    rows = [torch.stack(executor.logits[seq]) for seq in sorted(executor.logits)]
    return list(zip(ids.values(), rows, strict=True))
