"""The shapes of a decode step that a device runs over static buffers: few of them, each captured once."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape: rows of a step, and blocks of each row's table; a smaller step is padded up to it."""

    num_rows: int
    num_blocks: int


@dataclass(frozen=True)
class Buckets:
    """All shapes of a gang: every number of rows with every number of blocks, both ascending."""

    rows: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, max_rows: int, max_blocks: int, first_blocks: int | None = None) -> "Buckets":
        """Rows 1, 2, 4 … up to `max_rows`; blocks `first_blocks`, twice that … up to `max_blocks`, or only these.

        One number of blocks is enough where attention reads no further than each row's length. Where it gathers whole
        tables it reads what they hold, so they are padded to at most twice what is needed.
        """
        return cls(
            _doublings(1, max_rows), _doublings(max_blocks if first_blocks is None else first_blocks, max_blocks)
        )

    def of_step(self, num_rows: int, num_blocks: int) -> Bucket | None:
        """The smallest shape that holds a step; None where none does."""
        rows = next((rows for rows in self.rows if rows >= num_rows), None)
        blocks = next((blocks for blocks in self.blocks if blocks >= num_blocks), None)
        return None if rows is None or blocks is None or num_rows == 0 else Bucket(rows, blocks)

    def all(self) -> list[Bucket]:
        """All shapes, the largest first: captured first, its share of the memory pool also holds the others."""
        return sorted((Bucket(rows, blocks) for rows in self.rows for blocks in self.blocks), reverse=True)


def _doublings(first: int, last: int) -> tuple[int, ...]:
    numbers, number = [], first
    while number < last:
        numbers.append(number)
        number *= 2
    return (*numbers, last)
