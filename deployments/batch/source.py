"""The input read twice: once whole, for its fingerprint and where each part begins, then part by part, never held."""

import hashlib
from array import array
from collections.abc import Iterator

from deployments.batch.jsonl import JsonLines
from deployments.batch.lines import Line, Mark, Reader
from deployments.batch.parquet import ParquetRows
from deployments.batch.places import open_input

_DIGEST_BYTES = 8  # of a part of the input: whether it has changed since the first reading
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
        self._digests = bytearray()
        self.num_rows = 0
        self.sha256 = ""  # of all rows; how lines end, and empty ones, are no part of it

    def survey(self) -> Iterator[Line]:
        """Every row, once; after that `num_rows` and `sha256` are known, and `part` may be called."""
        whole, part = hashlib.sha256(), _PartDigest()
        for mark, line in self._reader.rows(Mark()):
            if mark.number % self.part_rows == 0:
                self._digests += part.value if mark.number else b""
                part = _PartDigest()
                self._offsets.append(mark.offset)
                self._lines.append(mark.line)
            whole.update(_framed(line))
            part.add(line)
            self.num_rows += 1
            yield line
        self._digests += part.value if self.num_rows else b""
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
        """The rows of one part. Raises ValueError, before the last one, when they are not those of the survey."""
        rows, digest = self.rows_of(part), _PartDigest()
        held: Line | None = None
        for mark, line in self._reader.rows(Mark(rows.start, self._offsets[part], self._lines[part])):
            if held is not None:
                yield held
            held = line
            digest.add(line)
            if mark.number == rows.stop - 1:
                break
        if held is None or held.number != rows.stop - 1 or digest.value != self._digest(part):
            raise ValueError(
                f"--input: {self._place} has changed since the job began (rows {rows.start + 1} to {rows.stop}); "
                "put the file back as it was, or start another job with another --output"
            )
        yield held

    def _digest(self, part: int) -> bytes:
        return bytes(self._digests[part * _DIGEST_BYTES : (part + 1) * _DIGEST_BYTES])


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


class _PartDigest:
    """A short digest of a part's rows."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)

    def add(self, line: Line) -> None:
        self._digest.update(_framed(line))

    @property
    def value(self) -> bytes:
        return self._digest.digest()


def _framed(line: Line) -> bytes:
    """The bytes of a row with their number before them, so that no two files give the same sequence."""
    raw = b"" if line.raw is None else line.raw
    return len(raw).to_bytes(8, "big") + raw
