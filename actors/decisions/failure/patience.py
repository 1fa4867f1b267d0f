"""How long a rank may stay silent, and a deadline for each step from what earlier steps took."""

from collections import deque

HEARTBEAT_S = 0.5  # every rank says that it lives this often
SILENCE_S = 3.0  # a rank without a heartbeat for so long is gone, stopped or cut off
LOADING_SILENCE_S = 30.0  # while it loads: a slow disk may hold the interpreter's lock; while it captures a graph
_CAPTURE_S = 60.0  # no capture of a graph is declared hung sooner: kernels may be compiled in it
_FLOOR_S = 2.5  # no step is declared hung sooner
_FACTOR = 10.0  # nor before so many times its expected seconds: cores may be shared with other programs
_FIXED_TOKENS = 16  # the fixed cost of a step, in tokens


class StepClock:
    """Tells when the oldest step in flight should have ended. Times are monotonic seconds."""

    def __init__(self, first_s: float) -> None:
        """`first_s`: the deadline while no step has ended yet."""
        self._first_s = first_s
        self._in_flight: deque[tuple[int, float, int]] = deque()  # step, submitted at, tokens
        self._head_since = 0.0  # when the oldest step in flight became the oldest
        self._seconds_per_token: float | None = None  # of the slowest step, slowly forgotten
        self._capturing_since: float | None = None

    def submitted(self, step: int, num_tokens: int, now: float) -> None:
        """Note a step that was sent and will have a result."""
        if not self._in_flight:
            self._head_since = now
        self._in_flight.append((step, now, num_tokens + _FIXED_TOKENS))

    def completed(self, now: float) -> None:
        """Note that the oldest step's result is here."""
        _, submitted, tokens = self._in_flight.popleft()
        rate = (now - submitted) / tokens
        known = self._seconds_per_token
        self._seconds_per_token = rate if known is None else max(rate, 0.95 * known + 0.05 * rate)
        self._head_since = now

    def begin_epoch(self) -> None:
        """Forget the steps in flight: they will not end. What steps take stays known."""
        self._in_flight.clear()
        self._capturing_since = None

    def capture_ordered(self, now: float) -> None:
        """Note that the ranks will capture a graph after the steps that were submitted."""
        self._capturing_since = now

    def capture_ended(self, now: float) -> None:
        """Note that they have: the steps in flight begin only now."""
        self._capturing_since = None
        self._in_flight = deque((step, now, tokens) for step, _, tokens in self._in_flight)
        self._head_since = now

    @property
    def is_capturing(self) -> bool:
        """Whether the ranks capture a graph, or are about to."""
        return self._capturing_since is not None

    def stalled_s(self, now: float) -> float:
        """Seconds since the oldest step in flight became the oldest; 0 while none is in flight."""
        return now - self._head_since if self._in_flight else 0.0

    @property
    def oldest(self) -> int | None:
        """The oldest step in flight; None while none is."""
        return self._in_flight[0][0] if self._in_flight else None

    @property
    def deadline(self) -> float | None:
        """When the oldest step in flight, or a capture, counts as hung; None while nothing is under way."""
        if self._capturing_since is not None:
            return self._capturing_since + _CAPTURE_S
        if not self._in_flight:
            return None
        if self._seconds_per_token is None:
            return self._head_since + self._first_s
        return self._head_since + max(_FLOOR_S, _FACTOR * self._seconds_per_token * self._in_flight[0][2])
