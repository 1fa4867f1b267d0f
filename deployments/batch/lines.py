"""Rows as they stand in an input file, and how they are read from a place in it."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


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
