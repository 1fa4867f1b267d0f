"""The deadlines of all requests that the engine has taken, the next one first."""

from heapq import heappop, heappush


class Deadlines:
    """Times are monotonic seconds. A request that ends earlier stays in it; `take_expired` returns it nevertheless."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, request_id: str, deadline: float) -> None:
        """Note that a request must have ended by `deadline`."""
        heappush(self._heap, (deadline, request_id))

    def seconds_left(self, now: float) -> float | None:
        """Seconds until the next deadline, at least 0; None while there is none."""
        return max(0.0, self._heap[0][0] - now) if self._heap else None

    def take_expired(self, now: float) -> list[str]:
        """Take out the requests whose deadline is over."""
        late = []
        while self._heap and self._heap[0][0] <= now:
            late.append(heappop(self._heap)[1])
        return late
