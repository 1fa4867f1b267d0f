"""The rows that a job has read and not answered: bounded in number and bytes, in the order in which gangs take them."""

import heapq
from collections.abc import Iterable, Iterator

from deployments.batch.order import Order, shape_of
from deployments.batch.rows import ANSWER_BYTES, WINDOW_BYTES, WINDOW_ROWS, Row


class Window:
    """Reads rows when there is room for them, and hands them out. A row is in it until it is answered."""

    def __init__(self, rows: Iterator[Row], num_slots: int, longest: int) -> None:
        """`num_slots`: sequences that all gangs run at once; `longest`: tokens of an answer without a limit."""
        self._rows = rows
        self._longest = longest
        self._order = Order(num_slots)
        self._unanswered: dict[int, Row] = {}  # by number, in the order of the input
        self._num_bytes = 0
        self._sent: set[int] = set()  # those of them that a gang has
        self._behind: list[tuple[int, int]] = []  # a heap: answered rows behind the oldest unanswered one, with bytes
        self._num_answer_bytes = 0  # of them
        self._next: Row | None = None  # read, but not yet let in
        self._is_end = False

    @property
    def num_waiting(self) -> int:
        """Rows that a gang may have."""
        return len(self._order) if not self._is_full else int(self._oldest not in self._sent)

    def fill(self) -> bool:
        """Read rows, if it is time to → whether any row is left to answer.

        Rows are ordered anew each time, so it waits until half of them have gone, and a quarter can come.
        """
        if len(self._order) <= WINDOW_ROWS // 2 and (not self._order or self._num_free >= WINDOW_ROWS // 4):
            was_end, read = self._is_end, list(self._read())
            if read or self._is_end != was_end:
                self._order.add((shape_of(row.number, row.body, self._longest) for row in read), self._is_end)
        return bool(self._unanswered)

    def take(self, gang: int, count: int) -> list[Row]:
        """Up to `count` rows for a gang, in the order in which it is to compute them.

        While too many answers wait for the oldest row without one, there is only that.
        """
        if not self._is_full:
            numbers = self._order.take(gang, count)
        elif count and (oldest := self._oldest) not in self._sent:
            self._order.pull(oldest)
            numbers = [oldest]
        else:
            numbers = []
        self._sent.update(numbers)
        return [self._unanswered[number] for number in numbers]

    def answered(self, number: int, num_bytes: int) -> None:
        """A row has its outcome, of so many bytes."""
        self._num_bytes -= self._unanswered.pop(number).num_bytes
        self._sent.discard(number)
        heapq.heappush(self._behind, (number, num_bytes))
        self._num_answer_bytes += num_bytes
        while self._behind and (not self._unanswered or self._behind[0][0] < self._oldest):
            self._num_answer_bytes -= heapq.heappop(self._behind)[1]

    def give_back(self, gang: int, rows: Iterable[Row]) -> None:
        """A gang has lost its cache, and these rows with it: they wait again."""
        self._order.forget(gang)
        rows = list(rows)
        self._sent.difference_update(row.number for row in rows)
        self._order.add(shape_of(row.number, row.body, self._longest) for row in rows)

    @property
    def _oldest(self) -> int:
        """The first row without an answer, where there is one: what is answered behind it cannot be written yet."""
        return next(iter(self._unanswered))

    @property
    def _is_full(self) -> bool:
        return self._num_answer_bytes >= ANSWER_BYTES

    @property
    def _num_free(self) -> int:
        """Rows that may be read: none is to be far ahead of one that has no answer, since answers are put in order."""
        if self._num_bytes >= WINDOW_BYTES or self._is_full:
            return 0
        oldest, newest = next(iter(self._unanswered), 0), next(reversed(self._unanswered), -1)
        return WINDOW_ROWS - (newest - oldest + 1)

    def _read(self) -> Iterator[Row]:
        while not self._is_end:
            if self._next is None:
                self._next = next(self._rows, None)
            if self._next is None:
                self._is_end = True
                return
            if self._unanswered and not self._has_room_for(self._next):
                return
            row, self._next = self._next, None
            self._unanswered[row.number] = row
            self._num_bytes += row.num_bytes
            yield row

    def _has_room_for(self, row: Row) -> bool:
        is_near = row.number - self._oldest < WINDOW_ROWS
        return is_near and self._num_bytes + row.num_bytes <= WINDOW_BYTES and not self._is_full
