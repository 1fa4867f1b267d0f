"""An executor without ranks, whose answers can be computed by hand: the next id is a sum over the cache's contents.

next id = (sum of all ids of the sequence + its length + its seed) modulo vocab_size, or the next one above it that is
not banned. It reads the ids back through the block tables, as attention would, so that a lost, doubled or overwritten
block shows as a wrong id. A grammar changes no id; it is late or fails, as `grammars_are_late` and `failing_grammar`
say. An id's log-probability falls by 1/8 with each step that it lies above the id that the model says without a seed,
modulo vocab_size.
"""

import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from actors.words.messages import (
    GRAMMAR_FAILED,
    Bucket,
    Captured,
    Entry,
    SamplingParams,
    StepBatch,
    StepResult,
    TokenLogprobs,
)  # fmt: skip


def next_id(ids: list[int], vocab_size: int, seed: int = 0, banned: Collection[int] = ()) -> int:
    """What the fake model says after `ids`."""
    token = (sum(ids) + len(ids) + seed) % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def logprobs_of(ids: list[int], token: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """What the fake model tells of `token` after `ids`."""
    best = next_id(ids, vocab_size)
    top_ids = [(best + place) % vocab_size for place in range(num_top)]
    return TokenLogprobs(-((token - best) % vocab_size) / 8, top_ids, [-place / 8 for place in range(num_top)])


@dataclass
class _Row:
    sampling: SamplingParams
    num_prompt: int
    blocks: list[int] = field(default_factory=list)
    last_ids: list[int] = field(default_factory=list)
    lane: int = -1  # whose step drew the last of them
    num_late: int = 0  # samples that will still bring no id


class FakeExecutor:
    """Executes each step at once, or one at a time when `is_manual`: then `release` lets the next result out."""

    def __init__(self, vocab_size: int = 1000, block_size: int = 16, is_manual: bool = False) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.is_manual = is_manual
        self.steps: list[StepBatch] = []
        self.failure: Exception | None = None
        self.is_closed = False
        self.num_checks = 0
        self.grammars_are_late = 0  # so many samples of a new row with a grammar bring no id
        self.failing_grammar = ""
        self.shapes: list[Bucket] = []
        self.ordered: list[Bucket] = []  # captures
        self._captured: list[Captured] = []
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
            self._changed.wait_for(lambda: self._ready or self._woken or self.failure or self._captured, timeout_s)
            self._woken = False
            if self.failure:
                raise self.failure
            results = list(self._ready)
            self._ready.clear()
            return results

    def check(self) -> None:
        """See Executor."""
        self.num_checks += 1

    def capture(self, bucket: Bucket) -> None:
        """See Executor. It ends with `end_capture`."""
        self.ordered.append(bucket)

    def end_capture(self, reason_not: str | None = None) -> None:
        """End the capture that was ordered last."""
        with self._changed:
            self._captured.append(Captured(0, self.ordered[-1], reason_not))
            self._changed.notify_all()

    def take_captured(self) -> list[Captured]:
        """See Executor."""
        with self._changed:
            captured, self._captured = self._captured, []
            return captured

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
            num_late = self.grammars_are_late if opened.sampling.grammar else 0
            self._rows[opened.seq] = _Row(opened.sampling, opened.num_prompt, num_late=num_late)
        for entry in step.entries:  # all keys and values of a step are written before any is read, as in a layer
            row = self._rows[entry.seq]
            row.blocks += entry.new_blocks
            assert entry.ids or row.last_ids, f"sequence {entry.seq}: it has no last token"
            assert entry.ids or row.lane == step.lane, f"sequence {entry.seq}: its last token is of lane {row.lane}"
            for offset, token in enumerate(entry.ids or row.last_ids[-1:]):
                self._cache[self._slot(row, entry.start + offset)] = token
        result = StepResult(step.epoch, step.step, [], [], [])
        for entry in step.entries:
            row = self._rows[entry.seq]
            ids = [self._cache[self._slot(row, at)] for at in range(entry.start + (len(entry.ids) or 1))]
            if entry.sample and row.num_late:
                row.num_late -= 1
                result.token_ids.append([])
                result.logprobs.append([])
            elif entry.sample:
                row.last_ids.append(self._draw(row, ids))
                row.lane = step.lane
                result.token_ids.append(row.last_ids[-1:])
                result.logprobs.append(self._told(row.sampling.logprobs, ids, row.last_ids[-1:]))
            if entry.prompt_logprobs:
                result.prompt_logprobs.append(self._told_of_prompt(row, entry, ids))
        return result if step.entries else None

    def _draw(self, row: _Row, ids: list[int]) -> int:
        if self.failing_grammar and row.sampling.grammar == self.failing_grammar:
            return GRAMMAR_FAILED
        is_short = len(ids) - row.num_prompt < row.sampling.min_tokens
        return next_id(ids, self.vocab_size, row.sampling.seed or 0, row.sampling.stop_ids if is_short else ())

    def _told(self, num_top: int | None, ids: list[int], following: list[int]) -> list[TokenLogprobs]:
        """Of each id that follows `ids`, one after the other."""
        if num_top is None:
            return []
        known = ids + following
        return [logprobs_of(known[:at], known[at], num_top, self.vocab_size) for at in range(len(ids), len(known))]

    def _told_of_prompt(self, row: _Row, entry: Entry, ids: list[int]) -> list[TokenLogprobs]:
        following = [] if entry.next_prompt_id is None else [entry.next_prompt_id]
        known = ids[: row.num_prompt] + following
        return self._told(row.sampling.prompt_logprobs, known[: entry.start + 1], known[entry.start + 1 :])

    def _slot(self, row: _Row, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + position % self.block_size
