"""Rows of a text file, a row a line: read in pieces, however long a line is."""

import io
from collections.abc import Iterator

from deployments.batch.lines import Line, Mark
from deployments.batch.places import open_input

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


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


def _skip_line(file: io.BufferedReader) -> int:
    """Go on behind the end of a line, in pieces → how many bytes that were."""
    num_bytes = 0
    while piece := file.readline(_CHUNK):
        num_bytes += len(piece)
        if piece.endswith(b"\n"):
            break
    return num_bytes
