"""The input read twice: once whole, for its fingerprint and a digest of each row, then part by part, never held."""

import hashlib
from array import array
from collections.abc import Iterator

from deployments.batch.jsonl import JsonLines
from deployments.batch.lines import Line, Mark, Reader
from deployments.batch.parquet import ParquetRows
from deployments.batch.places import open_input

_DIGEST_BYTES = 8  # of a row of the input: whether it has changed since the first reading
_FOREIGN = {  # how files begin that are no rows
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\xff\xfe": "is UTF-16; write it as UTF-8",
    b"\xfe\xff": "is UTF-16; write it as UTF-8",
}
_PARQUET = b"PAR1"


class Source:
    """The rows of an input file, in parts of the same number of rows."""

    def __init__(self, place: str, part_rows: int, max_row_bytes: int) -> None:
        """Raises ValueError for what is neither JSONL nor Parquet."""
        self._place, self.part_rows = place, part_rows
        self._reader = _reader(place, max_row_bytes)
        self._offsets, self._lines = array("Q"), array("Q")  # of each part's mark
        self._digests = array("Q")  # of each row
        self._reading: Iterator[tuple[Mark, Line]] = iter(())  # of the parts that follow each other
        self._at = -1  # the row that comes next there
        self.num_rows = 0
        self.sha256 = ""  # of all rows; how lines end, and empty ones, are no part of it

    def survey(self) -> Iterator[Line]:
        """Every row, once; after that `num_rows` and `sha256` are known, and `part` may be called."""
        whole = hashlib.sha256()
        for mark, line in self._reader.rows(Mark()):
            if mark.number % self.part_rows == 0:
                self._offsets.append(mark.offset)
                self._lines.append(mark.line)
            whole.update(_framed(line))
            self._digests.append(_digest(line))
            self.num_rows += 1
            yield line
        self.sha256 = whole.hexdigest()

    def again(self) -> Iterator[Line]:
        """Every row, once more."""
        return (line for _, line in self._reader.rows(Mark()))

    @property
    def num_parts(self) -> int:
        """How many parts there are; the last one may be shorter."""
        return len(self._offsets)

    def rows_of(self, part: int) -> range:
        """The numbers of a part's rows."""
        first = part * self.part_rows
        return range(first, min(first + self.part_rows, self.num_rows))

    def part(self, part: int) -> Iterator[Line]:
        """The rows of one part, each as it was in the survey. Raises ValueError in place of one that has changed.

        One at a time: a part that follows the last one is read on; before any other the file is opened anew.
        """
        rows = self.rows_of(part)
        if self._at != rows.start:
            self._reading = self._reader.rows(Mark(rows.start, self._offsets[part], self._lines[part]))
        for number in rows:
            self._at = -1
            _, line = next(self._reading, (None, None))
            if line is None or _digest(line) != self._digests[number]:
                raise ValueError(
                    f"--input: {self._place} has changed since the job began (row {number + 1}); "
                    "put the file back as it was, or start another job with another --output"
                )
            self._at = number + 1
            yield line


def _reader(place: str, max_row_bytes: int) -> Reader:
    """The Reader of a file, by what it begins with. Raises ValueError."""
    with open_input(place) as file:
        head = file.read(4)
    for magic, words in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"--input: {place} {words}")
    if head == _PARQUET:
        return ParquetRows(place)
    return JsonLines(place, max_row_bytes)


def _digest(line: Line) -> int:
    return int.from_bytes(hashlib.blake2b(_framed(line), digest_size=_DIGEST_BYTES).digest(), "big")


def _framed(line: Line) -> bytes:
    """The bytes of a row with their number before them, so that no two files give the same sequence."""
    raw = b"" if line.raw is None else line.raw
    return len(raw).to_bytes(8, "big") + raw
