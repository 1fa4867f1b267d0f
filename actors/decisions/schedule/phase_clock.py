"""Where a rank's time goes: seconds by phase, added up over its steps. Plain numbers that only grow."""

import time
from collections.abc import Callable

PHASES = {
    "idle": "waiting for the engine's next step",
    "receive": "waiting for the stage before",
    "compute": "its part of the model",
    "exchange": "all-reduces and gathers, waiting for the other shards included",
    "sample": "drawing the next ids and telling them",
    "send": "handing over to the next stage",
}
BUBBLE = (
    "idle",
    "receive",
    "send",
)  # a stage has nothing to compute; waiting inside a stage is the price of its shards


class PhaseClock:
    """One thread runs it, lap by lap: every moment belongs to one phase. Others may read."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._clock = clock
        self._since = clock()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was this phase."""
        now = self._clock()
        self.seconds[phase] += now - self._since
        self._since = now

    def within(self, phase: str, seconds: float) -> None:
        """Some of what has passed since the last lap was another phase than the one that will be named."""
        self.seconds[phase] += seconds
        self._since += seconds


def bubble_ratio(seconds: dict[str, float]) -> float:
    """Share of a rank's time in which its stage has nothing to compute, from 0 to 1."""
    total = sum(seconds.values())
    return sum(seconds[phase] for phase in BUBBLE) / total if total else 0.0
