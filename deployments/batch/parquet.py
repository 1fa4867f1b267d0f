"""Rows of a Parquet file: a column a field, each row made into JSON, so that it is read like a line of text."""

from collections.abc import Iterator
from typing import Any

import msgspec

from deployments.batch.lines import Line, Mark
from deployments.batch.places import open_input

_BATCH = 64  # rows decoded together


class ParquetRows:
    """A Reader. A null is an absent field; `body`, where a column has it, is a struct or JSON in text."""

    def __init__(self, place: str) -> None:
        """Raises ValueError where pyarrow is not installed, or cannot read the file."""
        self._place = place
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"--input: {place} is Parquet; pip install pyarrow (or the extra batch)") from None
        self._parquet, self._errors = pyarrow.parquet, (pyarrow.ArrowException, OSError)
        try:
            with open_input(place) as file:
                metadata = self._parquet.ParquetFile(file).metadata
                self._group_rows = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
        except self._errors as error:
            raise self._unreadable(error) from None

    def rows(self, mark: Mark) -> Iterator[tuple[Mark, Line]]:
        """See Reader. Row groups before the mark are not read."""
        number, group = 0, 0
        while group < len(self._group_rows) and number + self._group_rows[group] <= mark.number:
            number += self._group_rows[group]
            group += 1
        groups = list(range(group, len(self._group_rows)))
        if not groups:
            return
        with open_input(self._place) as file:
            try:
                for batch in self._parquet.ParquetFile(file).iter_batches(_BATCH, row_groups=groups):
                    for at in range(max(0, mark.number - number), batch.num_rows):
                        (fields,) = batch.slice(at, 1).to_pylist()
                        raw = msgspec.json.encode(_present(fields))
                        yield Mark(number + at), Line(number + at, f"row {number + at + 1}", raw)
                    number += batch.num_rows
            except self._errors as error:
                raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"--input: {self._place} cannot be read as Parquet: {error}; write it anew")


def _present(value: Any) -> Any:
    """The value without fields that are null, at any depth: columns have a place for every field in every row."""
    if isinstance(value, dict):
        return {key: _present(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_present(one) for one in value]
    return value
