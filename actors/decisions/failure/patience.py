"""How long silence may last: verdicts on heartbeats, and a deadline for each step from what steps take."""

from collections import deque

HEARTBEAT_S = 0.5  # every rank says that it lives this often
SILENCE_S = 3.0  # a rank not heard for so long is gone, stopped or cut off
LOADING_SILENCE_S = 30.0  # while it loads: a slow disk may hold the interpreter's lock
_FLOOR_S = 2.5  # no step is called hung before this
_FACTOR = 10.0  # nor before so many times what it should take: cores may be shared with anything
_FIXED_TOKENS = 16  # what a step costs beside its tokens, in tokens


class StepClock:
    """Tells when the oldest step in flight should have ended. Times are monotonic seconds."""

    def __init__(self, first_s: float) -> None:
        """`first_s`: patience while no step has shown yet what steps take."""
        self._first_s = first_s
        self._in_flight: deque[tuple[int, float, int]] = deque()  # step, submitted at, tokens
        self._head_since = 0.0  # when the oldest step in flight became the oldest
        self._seconds_per_token: float | None = None  # the slowest seen, slowly forgotten

    def submitted(self, step: int, num_tokens: int, now: float) -> None:
        """A step that will have a result was sent."""
        if not self._in_flight:
            self._head_since = now
        self._in_flight.append((step, now, num_tokens + _FIXED_TOKENS))

    def completed(self, now: float) -> None:
        """The oldest step's result is here."""
        _, submitted, tokens = self._in_flight.popleft()
        rate = (now - submitted) / tokens
        known = self._seconds_per_token
        self._seconds_per_token = rate if known is None else max(rate, 0.95 * known + 0.05 * rate)
        self._head_since = now

    def begin_epoch(self) -> None:
        """What is in flight will not end; what steps take stays known."""
        self._in_flight.clear()

    def stalled_s(self, now: float) -> float:
        """For how long no step has ended though one should; 0 while nothing is in flight."""
        return now - self._head_since if self._in_flight else 0.0

    @property
    def oldest(self) -> int | None:
        """The step that is due next."""
        return self._in_flight[0][0] if self._in_flight else None

    @property
    def deadline(self) -> float | None:
        """When the oldest step in flight counts as hung; None while nothing is in flight."""
        if not self._in_flight:
            return None
        if self._seconds_per_token is None:
            return self._head_since + self._first_s
        return self._head_since + max(_FLOOR_S, _FACTOR * self._seconds_per_token * self._in_flight[0][2])
