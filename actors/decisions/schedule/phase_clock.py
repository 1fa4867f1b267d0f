"""Where a rank's time goes: seconds by phase, summed over its steps. The numbers only grow."""

import time
from collections.abc import Callable

PHASES = {
    "idle": "waiting for the engine's next step",
    "receive": "waiting for the stage before",
    "compute": "its part of the model",
    "exchange": "all-reduces and gathers, waiting for the other shards included",
    "sample": "drawing the next ids and reporting them",
    "send": "handing over to the next stage",
    "capture": "capturing steps in graphs",
}
# The phases in which a stage has nothing to compute. Waiting for other shards is not one: it is the price of sharding.
BUBBLE = ("idle", "receive", "send")


class PhaseClock:
    """A stopwatch of one thread: every moment belongs to one phase. Other threads may read it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._clock = clock
        self._since = clock()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as this phase."""
        now = self._clock()
        self.seconds[phase] += now - self._since
        self._since = now

    def within(self, phase: str, seconds: float) -> None:
        """Count so many of the seconds since the last lap as this phase; the next lap gets the rest."""
        self.seconds[phase] += seconds
        self._since += seconds


def bubble_ratio(seconds: dict[str, float]) -> float:
    """The share of a rank's time in which its stage has nothing to compute, from 0 to 1."""
    total = sum(seconds.values())
    return sum(seconds[phase] for phase in BUBBLE) / total if total else 0.0
