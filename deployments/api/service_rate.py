"""The service rate: how fast a full server makes room, as it was measured, and when those that it refuses find some."""

import math
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 30.0  # over which the rate is measured
MAX_RETRY_S = 60
UNKNOWN_RETRY_S = 1  # while nothing has been measured


class ServiceRate:
    """Counts what leaves: sequences that end, or prompt tokens that have been computed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._left: deque[tuple[float, int]] = deque()
        self._amount = 0
        self._promised = -math.inf  # until then all room that comes free is promised

    def note(self, amount: int) -> None:
        """So much has left now."""
        self._left.append((self._clock(), amount))
        self._amount += amount
        self._forget()

    @property
    def per_s(self) -> float:
        """What leaves in a second; 0 while nothing has been measured."""
        self._forget()
        return self._amount / max(self._clock() - self._left[0][0], 1.0) if self._left else 0.0

    def retry_after_s(self, amount: int, held: int) -> int:
        """Whole seconds until there is room for `amount`, behind what was promised before to others.

        `held`: what is in now. Once all of it has left, promises begin anew: not everybody comes back.
        """
        per_s, now = self.per_s, self._clock()
        if not per_s:
            return UNKNOWN_RETRY_S
        promised = max(self._promised, now) + amount / per_s
        if promised > now + held / per_s:
            promised = now + amount / per_s
        self._promised = promised
        return min(MAX_RETRY_S, max(1, math.ceil(promised - now)))

    def _forget(self) -> None:
        while self._left and self._left[0][0] < self._clock() - WINDOW_S:
            self._amount -= self._left.popleft()[1]
