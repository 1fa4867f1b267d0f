"""How much prefill a step may carry beside tokens that people wait for: learnt from how long steps take.

A running stream feels every prompt that is computed beside it; a prompt that gives way too much starves. So a mixed
step takes at most so much longer than one that only decodes, unless prompts outnumber what runs: then they may take as
much more as they are more.
"""

import math
from collections import deque

from actors.words.messages import StepBatch

_SHARE = 1.2  # seconds of prefill to one second of decode, where both sides are equally many
_FEWEST_TOKENS = 32  # of a chunk: smaller ones only read the weights again
_PORTION = 2  # decode steps that prompts take in a pipeline: so long that reading the weights does not count
_MEMORY = 0.9  # share of what was known that one more step leaves


class PrefillPace:
    """Told of every step when it goes and when it is done. Times are seconds of one clock."""

    def __init__(self, num_lanes: int = 1) -> None:
        self._num_lanes = num_lanes
        self._flights: deque[tuple[bool, int, float]] = deque()  # whether it decodes, tokens of prompts, when
        self._last_end = 0.0
        self._decode_s: float | None = None  # of a step that only decodes
        self._token_s: float | None = None  # of one prompt token more

    def launched(self, step: StepBatch, now: float) -> None:
        """A step with entries went to the ranks."""
        num_prompt = sum(len(entry.ids) for entry in step.entries if len(entry.ids) > 1)
        decodes = any(len(entry.ids) <= 1 for entry in step.entries)
        self._flights.append((decodes, num_prompt, now))

    def completed(self, now: float) -> None:
        """The oldest step is done; it began when it went, or when the one before it was done."""
        decodes, num_prompt, launched = self._flights.popleft()
        took_s, self._last_end = now - max(launched, self._last_end), now
        if not num_prompt:
            self._decode_s = _mixed(self._decode_s, took_s)
        elif num_prompt >= _FEWEST_TOKENS:
            beside_s = (self._decode_s or 0.0) if decodes else 0.0
            self._token_s = _mixed(self._token_s, max(0.0, took_s - beside_s) / num_prompt)

    def forget_flights(self) -> None:
        """What went will not come back."""
        self._flights.clear()

    def prefill_tokens(self, num_prefilling: int, num_decoding: int, at_most: int) -> int:
        """Prompt tokens that the next step may carry."""
        share = _SHARE * max(1.0, num_prefilling / num_decoding) if num_decoding else math.inf
        if self._num_lanes > 1:
            share = min(share, _PORTION)
        if not self._decode_s or not self._token_s or share == math.inf:
            return at_most
        return min(at_most, max(_FEWEST_TOKENS, int(share * self._decode_s / self._token_s)))


def _mixed(known: float | None, seen: float) -> float:
    return seen if known is None else _MEMORY * known + (1 - _MEMORY) * seen
