"""The input read twice: once whole, for its fingerprint and where each part begins, then part by part, never held."""

import hashlib
import io
from array import array
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from deployments.batch.places import open_input

_DIGEST_BYTES = 8  # of a part of the input: whether it has changed since the first reading
_CHUNK = 1 << 20
_FOREIGN = {  # how files begin that are no rows
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\xff\xfe": "is UTF-16; write it as UTF-8",
    b"\xfe\xff": "is UTF-16; write it as UTF-8",
}
_BOM = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"


class Line(NamedTuple):
    """A row as it stands in the input."""

    number: int  # of the row, from 0
    place: str  # for people: "line 12"
    raw: bytes | None  # JSON as it was written, or made of a Parquet row; None: longer than a row may be


class Mark(NamedTuple):
    """Where a row begins: its number from 0 and, in text, its byte and line."""

    number: int = 0
    offset: int = 0
    line: int = 1


class Reader(Protocol):
    """Reads the rows of one kind of file."""

    def rows(self, mark: Mark) -> Iterator[tuple[Mark, Line]]:
        """The rows from a mark on, each with its own mark. Raises ValueError."""


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


class JsonLines:
    """A Reader of text, a row a line; a byte-order mark, CRLF, empty lines and no last newline are all fine."""

    def __init__(self, place: str, max_row_bytes: int) -> None:
        self._place, self._max_row_bytes = place, max_row_bytes

    def rows(self, mark: Mark) -> Iterator[tuple[Mark, Line]]:
        """See Reader."""
        number, offset, line = mark
        with open_input(self._place) as file:
            file.seek(offset)
            while piece := file.readline(self._max_row_bytes + 2):
                raw, is_whole = piece.rstrip(b"\r\n"), piece.endswith(b"\n") or len(piece) <= self._max_row_bytes
                num_bytes = len(piece) + (0 if is_whole else _skip_line(file))
                if line == 1:
                    raw = raw.removeprefix(_BOM)
                if raw.strip() or not is_whole:
                    fits = is_whole and len(raw) <= self._max_row_bytes
                    yield Mark(number, offset, line), Line(number, f"line {line}", raw if fits else None)
                    number += 1
                offset, line = offset + num_bytes, line + 1


def _reader(place: str, max_row_bytes: int) -> Reader:
    """The Reader of a file, by what it begins with. Raises ValueError."""
    with open_input(place) as file:
        head = file.read(4)
    for magic, words in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"--input: {place} {words}")
    if head == _PARQUET:
        from deployments.batch.parquet import ParquetRows

        return ParquetRows(place)
    return JsonLines(place, max_row_bytes)


def _skip_line(file: io.BufferedReader) -> int:
    """Go on behind the end of a line, in pieces → how many bytes that were."""
    num_bytes = 0
    while piece := file.readline(_CHUNK):
        num_bytes += len(piece)
        if piece.endswith(b"\n"):
            break
    return num_bytes


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
