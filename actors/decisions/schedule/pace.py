"""How much prefill a step may carry beside tokens that people wait for: learnt from how long steps take.

A running stream feels every prompt that is computed beside it; a prompt that gives way too much starves. So a mixed
step takes at most so much longer than one that only decodes, unless prompts outnumber what runs: then they may take as
much more as they are more. In a pipeline every lane's step carries its part, so that stages wait little for each other.
"""

import math
from collections import deque

import numpy as np
import numpy.typing as npt

from actors.words.messages import StepBatch

Array = npt.NDArray[np.float64]
Known = tuple[Array, Array, Array]  # products and sums of what was seen [3, 3], [3], and the seconds that follow [3]

_SHARE = 1.3  # seconds of prefill to one second of decode, over all lanes, where both sides are equally many
_FEWEST_TOKENS = 16  # of a chunk: smaller ones only read the weights again
_PORTION = 2  # decode steps that prompts may take in a pipeline: so long that reading the weights does not count
_MOST_TOKENS = 512  # that any machine computes in the time in which it reads the weights; GPUs reach 300
_MERGE_BELOW = 0.25  # what took so little of its time, after a late one, was told with that: their times are one
_FORGETTING = 0.97  # weight of a step beside the next one
_RIDGE = 0.01  # how much what is known stands against what the steps of late leave open, ...
_RIDGES = _RIDGE * np.diag((1.0, 64.0, 1.0))  # ... in squares of steps, of eight rows, and of single tokens


class PrefillPace:
    """Told of every step when it goes and when it is done. Times are seconds of one clock.

    What it believes: a step takes a time of its own, so much a row that decodes, and so much a token of a prompt. The
    three are those that leave the least squares of relative errors, of late steps more than of early ones.
    """

    def __init__(self, num_lanes: int = 1) -> None:
        self._num_lanes = num_lanes
        self._flights: deque[tuple[int, int, float]] = deque()  # rows that decode, tokens of prompts, when
        self._last_end = 0.0
        self._counts, self._took_s = np.zeros(3), 0.0  # of the last step, or of several whose results came together
        self._known: Known = np.zeros((3, 3)), np.zeros(3), np.zeros(3)
        self._before = self._known  # without the last step

    def launched(self, step: StepBatch, now: float) -> None:
        """A step with entries went to the ranks."""
        chunks = [count for entry in step.entries if (count := len(entry.ids)) > 1]
        self._flights.append((len(step.entries) - len(chunks), sum(chunks), now))

    def completed(self, now: float) -> None:
        """The oldest step is done; it began when it went, or when the one before it was done."""
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
        """Of a step, of a row that decodes, of a token of a prompt [3]; zeros while nothing is known."""
        return self._known[2]

    def forget_flights(self) -> None:
        """What went will not come back."""
        self._flights.clear()

    def prefill_tokens(self, num_prefilling: int, num_decoding: int, at_most: int) -> int:
        """Prompt tokens that the next step may carry; sequences of all lanes are counted."""
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
    """With one observation more: `counts` are those of one second."""
    products, sums, seconds = known
    products, sums = _FORGETTING * products + np.outer(counts, counts), _FORGETTING * sums + counts
    inertia = products[0, 0] * _RIDGES
    matrix, vector = products + inertia, sums + inertia @ seconds
    free = 3 if counts[2] else 2  # a step without prompts says nothing of what their tokens cost
    vector -= matrix[:, free:] @ seconds[free:]
    found = np.linalg.solve(matrix[:free, :free], vector[:free]).clip(min=0.0)
    return products, sums, np.concatenate((found, seconds[free:]))
