"""A model of how long steps take, learnt while they run, and from it how many prompt tokens the next step may carry.

Prompt tokens in a step delay the tokens of all sequences that decode in it; a prompt that is given too few of them
starves. So a step with prompt tokens may take a fixed share longer than one that only decodes. Where more sequences
prefill than decode, the share grows by that ratio. In a pipeline each lane's step carries its part of it, so that the
stages wait little for each other.
"""

import math
from collections import deque

import numpy as np
import numpy.typing as npt

from actors.words.messages import StepBatch

Array = npt.NDArray[np.float64]
# Of the observations: the sums of products [3, 3] and of counts [3]; and the seconds that follow from them [3]
Known = tuple[Array, Array, Array]

_SHARE = 1.3  # seconds of prefill a second of decode, over all lanes, while no more sequences prefill than decode
_FEWEST_TOKENS = 16  # of a chunk: smaller ones only read the weights again
_PORTION = 2  # decode steps that prompt tokens may take in a pipeline: reading the weights is a small part of it
_MOST_TOKENS = 512  # no machine computes more prompt tokens while it reads the weights once; GPUs reach 300
_MERGE_BELOW = 0.25  # of its expected time: a step that took less, after a late one, was reported with that one
_FORGETTING = 0.97  # the weight of an observation, relative to that of the next one
_RIDGE = 0.01  # how strongly the seconds stay where they were, where recent steps do not determine them, ...
_RIDGES = _RIDGE * np.diag((1.0, 64.0, 1.0))  # ... scaled to a step, to eight rows that decode, and to a prompt token


class StepTimeModel:
    """Seconds of a step = a constant + so many for each row that decodes + so many for each prompt token.

    The three numbers are fitted by recursive least squares with forgetting, on relative errors. Times are seconds of
    one clock.
    """

    def __init__(self, num_lanes: int = 1) -> None:
        self._num_lanes = num_lanes
        self._flights: deque[tuple[int, int, float]] = deque()  # rows that decode, prompt tokens, launched at
        self._last_end = 0.0
        self._counts, self._took_s = np.zeros(3), 0.0  # of the last step, or of several whose results came together
        self._known: Known = np.zeros((3, 3)), np.zeros(3), np.zeros(3)
        self._before = self._known  # without the last step

    def launched(self, step: StepBatch, now: float) -> None:
        """Note a step with entries that goes to the ranks."""
        chunks = [count for entry in step.entries if (count := len(entry.ids)) > 1]
        self._flights.append((len(step.entries) - len(chunks), sum(chunks), now))

    def completed(self, now: float) -> None:
        """Learn from the oldest step, which is done. It began when it was launched, or when the one before was done."""
        num_rows, num_prompt, launched = self._flights.popleft()
        took_s, self._last_end = now - max(launched, self._last_end), now
        counts, before = np.array((1.0, num_rows, num_prompt)), self._known
        is_late = self._took_s > self._counts @ self.seconds
        if is_late and took_s < _MERGE_BELOW * (counts @ self.seconds):
            counts, took_s, before = counts + self._counts, took_s + self._took_s, self._before
        self._counts, self._took_s, self._before = counts, took_s, before
        if took_s > 0:
            self._known = _learned(before, counts / took_s)

    @property
    def seconds(self) -> Array:
        """The fitted numbers [3]: of a step, of a row that decodes, of a prompt token; zeros while nothing is known."""
        return self._known[2]

    def stopped(self, now: float) -> None:
        """The ranks did something else until now: steps in flight begin only now."""
        self._last_end = now

    def forget_flights(self) -> None:
        """Forget the steps in flight: their results will not come."""
        self._flights.clear()

    def prefill_tokens(self, num_prefilling: int, num_decoding: int, at_most: int) -> int:
        """How many prompt tokens the next step may carry, given the numbers of sequences in all lanes."""
        share = _SHARE / self._num_lanes * max(1.0, num_prefilling / num_decoding) if num_decoding else math.inf
        if self._num_lanes > 1:
            share = min(share, _PORTION)
        step_s, row_s, token_s = self.seconds.tolist()
        decode_s = step_s + row_s * max(1.0, num_decoding / self._num_lanes)
        token_s = max(token_s, step_s / _MOST_TOKENS)
        if decode_s <= 0 or token_s <= 0 or share == math.inf:
            return at_most
        return min(at_most, max(_FEWEST_TOKENS, int(share * decode_s / token_s)))


def _learned(known: Known, counts: Array) -> Known:
    """What is known with one more observation: `counts` (steps, rows, prompt tokens) took one second."""
    products, sums, seconds = known
    products, sums = _FORGETTING * products + np.outer(counts, counts), _FORGETTING * sums + counts
    inertia = products[0, 0] * _RIDGES
    matrix, vector = products + inertia, sums + inertia @ seconds
    free = 3 if counts[2] else 2  # a step without prompts says nothing of what their tokens cost
    vector -= matrix[:, free:] @ seconds[free:]
    found = np.linalg.solve(matrix[:free, :free], vector[:free]).clip(min=0.0)
    return products, sums, np.concatenate((found, seconds[free:]))
