"""Sets of bytes as sorted intervals [first, end): their union, what one lacks of another, and pieces of a size."""

from collections.abc import Iterable, Iterator

Interval = tuple[int, int]  # [first, end)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union: sorted, without empty ones, those that touch as one."""
    union: list[Interval] = []
    for first, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if union and first <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((first, end))
    return union


def without(wanted: Iterable[Interval], held: Iterable[Interval]) -> list[Interval]:
    """What is wanted and not held."""
    lacking: list[Interval] = []
    held_in_order = merged(held)
    number = 0
    for first, end in merged(wanted):
        while number < len(held_in_order) and held_in_order[number][1] <= first:
            number += 1
        at, ahead = first, number
        while ahead < len(held_in_order) and held_in_order[ahead][0] < end:
            lacking.append((at, held_in_order[ahead][0]))
            at = held_in_order[ahead][1]
            ahead += 1
        lacking.append((at, end))
    return merged(lacking)


def num_bytes(intervals: Iterable[Interval]) -> int:
    """How many bytes are in intervals that do not overlap."""
    return sum(end - first for first, end in intervals)


def pieces(intervals: Iterable[Interval], size: int) -> Iterator[Interval]:
    """Intervals cut at the multiples of `size`: where two sets overlap, both are cut at the same places."""
    for first, end in intervals:
        at = first
        while at < end:
            until = min(end, (at // size + 1) * size)
            yield at, until
            at = until
