"""How the shards of a stage are numbered along the NVLinks between their GPUs, and which of them lack one."""

from collections.abc import Sequence
from itertools import combinations, permutations

_MOST_TRIED = 8  # GPUs whose orders are all tried: 5040 of them; machines with more have a switch

Joined = Sequence[Sequence[int]]  # [gpu][gpu]: NVLinks between two GPUs; 0: PCIe only


def order_along_links(joined: Joined) -> tuple[int, ...]:
    """The GPUs in an order in which neighbors, the last and the first too, have as many links as possible.

    The narrowest place of the ring counts first, then all links of it. GPUs that are alike keep their order.
    """
    given = tuple(range(len(joined)))
    counts = {joined[a][b] for a, b in combinations(given, 2)}
    if len(counts) <= 1 or len(given) > _MOST_TRIED:
        return given
    orders = ((0, *rest) for rest in permutations(given[1:]))
    return max(orders, key=lambda order: _ring(joined, order))  # of equal ones the first, which is the given one


def unjoined_pairs(joined: Joined) -> list[tuple[int, int]]:
    """Pairs of GPUs that no NVLink joins."""
    return [(a, b) for a, b in combinations(range(len(joined)), 2) if not joined[a][b]]


def has_joined(joined: Joined, size: int) -> bool:
    """Whether there are so many GPUs of which NVLink joins each two."""
    apart = set(unjoined_pairs(joined))
    return any(apart.isdisjoint(combinations(some, 2)) for some in combinations(range(len(joined)), size))


def _ring(joined: Joined, order: Sequence[int]) -> tuple[int, int]:
    hops = [joined[a][b] for a, b in zip(order, (*order[1:], order[0]), strict=True)]
    return min(hops), sum(hops)
