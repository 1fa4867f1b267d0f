"""The journal: ended rows of parts that are not whole yet, so that little is computed again after a death.

Gangs answer rows out of order, and a part is written when its last row has ended. What waits for that is written every
few seconds into a file of its own, which is never changed, and removed once all its rows are in parts.
"""

import time
from collections.abc import Callable

import msgspec

from deployments.batch.store import Store

_SAVE_S = 2.0  # of work that may be lost; each time costs one file


class Ended(msgspec.Struct, frozen=True):
    """A row that has ended, with the line that its part will hold."""

    number: int
    is_error: bool
    line: msgspec.Raw


class Journal:
    """Ended rows on their way into parts. Used under the job's lock."""

    def __init__(self, store: Store, lease_number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._lease_number, self._clock = store, lease_number, clock
        self._files: dict[str, set[int]] = {}  # rows of each file that are in no part yet
        self._unsaved: dict[int, Ended] = {}
        self._num_written = 0
        self._saved_at = clock()

    def load(self, is_wanted: Callable[[int], bool]) -> dict[int, Ended]:
        """What earlier drivers left, of rows that are wanted; files without any are removed."""
        found: dict[int, Ended] = {}
        for name in sorted(name for name in self._store.sizes() if name.startswith("journal-")):
            entries = [entry for entry in _entries(self._store.read(name) or b"") if is_wanted(entry.number)]
            for entry in entries:
                found.setdefault(entry.number, entry)
            self._files[name] = {entry.number for entry in entries}
        self.in_parts(range(0))
        return found

    def add(self, entry: Ended) -> None:
        """A row has ended."""
        self._unsaved[entry.number] = entry

    def in_parts(self, rows: range) -> None:
        """A part with these rows is written: they are not needed here any more."""
        for number in rows:
            self._unsaved.pop(number, None)
        for name, numbers in list(self._files.items()):
            numbers.difference_update(rows)
            if not numbers:
                self._store.remove(name)
                del self._files[name]

    @property
    def is_due(self) -> bool:
        """Whether the last time that it was saved is long enough ago."""
        return self._clock() >= self._saved_at + _SAVE_S

    def save(self) -> None:
        """Write what has ended since the last time, if anything."""
        self._saved_at = self._clock()
        entries, self._unsaved = self._unsaved, {}
        if entries:
            name = f"journal-{self._lease_number:05d}-{self._num_written:05d}.jsonl"
            self._num_written += 1
            self._files[name] = set(entries)
            self._store.create(name, b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries.values()))


def _entries(data: bytes) -> list[Ended]:
    """The entries of a file; the last one of a file that was torn off is left out."""
    entries = []
    for line in data.split(b"\n")[:-1]:  # a bare \r may stand within
        try:
            entries.append(msgspec.json.decode(line, type=Ended))
        except msgspec.MsgspecError:
            break
    return entries
