"""The rows that a job has read and not answered: bounded in number and bytes, in the order in which gangs take them."""

from collections.abc import Iterable, Iterator

from deployments.batch.order import Order, shape_of
from deployments.batch.rows import WINDOW_BYTES, WINDOW_ROWS, Row


class Window:
    """Reads rows when there is room for them, and hands them out. A row is in it until it is answered."""

    def __init__(self, rows: Iterator[Row], num_slots: int, longest: int) -> None:
        """`num_slots`: sequences that all gangs run at once; `longest`: tokens of an answer without a limit."""
        self._rows = rows
        self._longest = longest
        self._order = Order(num_slots)
        self._unanswered: dict[int, Row] = {}  # by number, in the order of the input
        self._num_bytes = 0
        self._next: Row | None = None  # read, but not yet let in
        self._is_end = False

    @property
    def num_waiting(self) -> int:
        """Rows that no gang has."""
        return len(self._order)

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
        """Up to `count` rows for a gang, in the order in which it is to compute them."""
        return [self._unanswered[number] for number in self._order.take(gang, count)]

    def answered(self, number: int) -> None:
        """A row has its outcome."""
        self._num_bytes -= self._unanswered.pop(number).num_bytes

    def give_back(self, gang: int, rows: Iterable[Row]) -> None:
        """A gang has lost its cache, and these rows with it: they wait again."""
        self._order.forget(gang)
        self._order.add(shape_of(row.number, row.body, self._longest) for row in rows)

    @property
    def _num_free(self) -> int:
        """Rows that may be read: none is to be far ahead of one that has no answer, since answers are put in order."""
        if self._num_bytes >= WINDOW_BYTES:
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
        oldest = next(iter(self._unanswered))
        return row.number - oldest < WINDOW_ROWS and self._num_bytes + row.num_bytes <= WINDOW_BYTES
