"""An executor without ranks, whose answers can be computed by hand: the next id is a sum over the cache's contents.

next id = (sum of all ids of the sequence + its length + its seed) modulo vocab_size. It reads the ids back through the
block tables, as attention would, so that a lost, doubled or overwritten block shows as a wrong id.
"""

import threading
from collections import deque
from dataclasses import dataclass, field

from actors.words.messages import SamplingParams, StepBatch, StepResult


def next_id(ids: list[int], vocab_size: int, seed: int = 0) -> int:
    """What the fake model says after `ids`."""
    return (sum(ids) + len(ids) + seed) % vocab_size


@dataclass
class _Row:
    sampling: SamplingParams
    blocks: list[int] = field(default_factory=list)
    last_ids: list[int] = field(default_factory=list)


class FakeExecutor:
    """Executes each step at once, or one at a time when `is_manual`: then `release` lets the next result out."""

    def __init__(self, vocab_size: int = 1000, block_size: int = 16, is_manual: bool = False) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.is_manual = is_manual
        self.steps: list[StepBatch] = []
        self.failure: Exception | None = None
        self.is_closed = False
        self._rows: dict[int, _Row] = {}
        self._cache: dict[int, int] = {}  # slot → id
        self._done: deque[StepResult] = deque()
        self._ready: deque[StepResult] = deque()
        self._changed = threading.Condition()
        self._woken = False

    @property
    def open_rows(self) -> list[int]:
        """Sequences that have a row, as the ranks' tables would."""
        return list(self._rows)

    def submit(self, step: StepBatch) -> None:
        """Execute the step; its result is ready at once unless `is_manual`."""
        with self._changed:
            self.steps.append(step)
            result = self._execute(step)
            if result is not None:
                (self._done if self.is_manual else self._ready).append(result)
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """See Executor."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._woken or self.failure, timeout_s)
            self._woken = False
            if self.failure:
                raise self.failure
            results = list(self._ready)
            self._ready.clear()
            return results

    def wake(self) -> None:
        """See Executor."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def release(self, count: int = 1) -> int:
        """Let out up to `count` results of steps already submitted; returns how many were there."""
        with self._changed:
            released = min(count, len(self._done))
            for _ in range(released):
                self._ready.append(self._done.popleft())
            self._changed.notify_all()
            return released

    def fail(self, failure: Exception) -> None:
        """Make `wait` raise from now on."""
        with self._changed:
            self.failure = failure
            self._changed.notify_all()

    def close(self) -> None:
        """See Executor."""
        self.is_closed = True

    def _execute(self, step: StepBatch) -> StepResult | None:
        for seq in step.closed:
            del self._rows[seq]
        for opened in step.opened:
            self._rows[opened.seq] = _Row(opened.sampling)
        for entry in step.entries:  # all keys and values of a step are written before any is read, as in a layer
            row = self._rows[entry.seq]
            row.blocks += entry.new_blocks
            for offset, token in enumerate(entry.ids or row.last_ids[-1:]):
                self._cache[self._slot(row, entry.start + offset)] = token
        sampled = []
        for entry in step.entries:
            if entry.sample:
                row = self._rows[entry.seq]
                length = entry.start + (len(entry.ids) or 1)
                ids = [self._cache[self._slot(row, position)] for position in range(length)]
                row.last_ids.append(next_id(ids, self.vocab_size, row.sampling.seed or 0))
                sampled.append(row.last_ids[-1:])
        return StepResult(step.epoch, step.step, sampled) if step.entries else None

    def _slot(self, row: _Row, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + position % self.block_size
