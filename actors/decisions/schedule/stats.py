"""What the engine counts: numbers that only grow, written in its thread and read from any.

Nothing is locked: a reader may see only some of the numbers of the latest step.
"""

import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Numbers
from dataclasses import dataclass
from typing import get_args

from actors.decisions.schedule.sequence import Sequence
from actors.words.errors import Cause
from actors.words.messages import FinishReason, StepBatch

# The phases of recovery after a gang was lost, in order.
RECOVERY_PHASES = {
    "detect": "from the last sign of progress to the verdict",
    "drain": "waiting for GPUs that wait for a lost rank in a kernel that cannot be aborted, up to a second",
    "fence": "ending the old epoch: survivors leave it and are checked",
    "start": "processes in place of those that are gone",
    "join": "groups and channel of the new epoch",
    "load": "weights of the ranks that have none",
    "warm": "cache, and the first shapes",
    "replay": "computing again what ran, until every request has a new id",
}

# Seconds; the buckets that dashboards of other engines use for requests as a whole.
REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = tuple(2**power for power in range(15))
REQUEST_TOKENS = tuple(step * 10**power for power in range(7) for step in (1, 2, 5))
RECOVERY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Histogram:
    """Observations counted by range, as Prometheus' histograms are made of."""

    def __init__(self, bounds: Numbers[float]) -> None:
        """`bounds` ascend; values above the last are counted too."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # by bound: values up to it and above the one before
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass
class KeyUsage:
    """Tokens of one API key's requests; see Stats for what each counts."""

    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0


class Stats:
    """The counters of one engine, over all its epochs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self.clock = clock
        self.num_prompt = 0  # prompt tokens of requests that have begun to run; each was looked up in the prefix cache
        self.num_prompt_cached = 0  # those of them that were found there
        self.num_generated = 0  # tokens
        self.by_key: dict[str, KeyUsage] = {}  # by the key's name; "" where none is asked for
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_replayed = 0  # requests that ran and were computed again in another epoch; one may count several times
        self.num_replayed_tokens = 0
        self.num_rebuilds: dict[Cause, int] = dict.fromkeys(get_args(Cause), 0)
        self.recovery_s = {phase: Histogram(RECOVERY_SECONDS) for phase in RECOVERY_PHASES}
        self.num_finished: dict[FinishReason, int] = dict.fromkeys(get_args(FinishReason), 0)
        self.queue_s = Histogram(REQUEST_SECONDS)  # from the engine taking a request to its first step
        self.step_tokens = Histogram(STEP_TOKENS)
        self.prompt_tokens = Histogram(REQUEST_TOKENS)  # of a sequence that begins to run
        self.generated_tokens = Histogram(REQUEST_TOKENS)  # of a sequence that has ended
        self.progress_at = clock()  # when the last result came, or the first request after a time without any

    def opened(self, sequence: Sequence, num_reused: int) -> None:
        """Count a sequence that begins to run for the first time, `num_reused` of its ids from the cache."""
        if sequence.waiting_since is None:
            return  # computed again: it was preempted, or a gang was lost
        self.queue_s.observe(self.clock() - sequence.waiting_since)
        sequence.waiting_since, sequence.num_cached = None, num_reused
        num_prompt, usage = len(sequence.request.prompt_ids), self._usage(sequence)
        self.num_prompt += num_prompt
        self.prompt_tokens.observe(num_prompt)
        self.num_prompt_cached += num_reused
        usage.num_prompt += num_prompt
        usage.num_cached += num_reused

    def generated(self, sequence: Sequence, count: int) -> None:
        """Count generated tokens of a sequence."""
        self.num_generated += count
        self._usage(sequence).num_generated += count

    def _usage(self, sequence: Sequence) -> KeyUsage:
        return self.by_key.setdefault(sequence.request.key, KeyUsage())

    def launched(self, step: StepBatch) -> None:
        """Count a step that goes to the ranks and will have a result."""
        self.num_steps += 1
        self.step_tokens.observe(sum(len(entry.ids) or 1 for entry in step.entries))

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        """Count a sequence that has ended."""
        self.num_finished[reason] += 1
        self.generated_tokens.observe(sequence.num_generated)

    def queued(self, is_alone: bool) -> float:
        """When a request is queued: now, in seconds of the clock. Where it `is_alone`, nothing was due before it."""
        return self.progressed() if is_alone else self.clock()

    def progressed(self) -> float:
        """Note that the ranks go on → now, in seconds of the clock."""
        self.progress_at = self.clock()
        return self.progress_at
