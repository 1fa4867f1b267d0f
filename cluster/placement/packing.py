"""Bundles into nodes: the search behind placement, on whole numbers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from cluster.placement.resources import Amounts

_Kind = tuple[Amounts, tuple[bool, ...]]  # what a bundle asks, and on which nodes it may be
_State = tuple[int, ...]  # how many bundles of each kind are still to be placed
_MOST_STATES = 128  # followed at a time, over the number of kinds
_MOST_FILLINGS = 20_000  # tried in all: about a second


def spread(asked: Sequence[Amounts], room: Sequence[Amounts], allowed: Sequence[Sequence[bool]]) -> list[int] | None:
    """Each bundle on a node of its own → node by bundle, or None. Exact: a matching by augmenting paths."""
    fitting = [
        [node for node, has in enumerate(room) if row[node] and _fits(amounts, has)]
        for amounts, row in zip(asked, allowed, strict=True)
    ]
    holder: dict[int, int] = {}  # node → bundle

    def place(bundle: int, seen: set[int]) -> bool:
        free = next((node for node in fitting[bundle] if node not in holder), None)
        if free is not None:
            holder[free] = bundle
            return True
        for node in fitting[bundle]:
            if node not in seen:
                seen.add(node)
                if place(holder[node], seen):
                    holder[node] = bundle
                    return True
        return False

    if not all(place(bundle, set()) for bundle in range(len(asked))):
        return None
    nodes = {bundle: node for node, bundle in holder.items()}
    return [nodes[bundle] for bundle in range(len(asked))]


def pack(asked: Sequence[Amounts], room: Sequence[Amounts], allowed: Sequence[Sequence[bool]]) -> list[int] | None:
    """Several bundles may share a node → node by bundle, or None.

    Bundles that are alike are of one kind. Node after node, largest first, the ways to fill it are tried on every
    state (what is left to place) that no other state beats. Exact for the few kinds that pipelines have (a first
    stage, and others that differ by a layer or two); with many kinds it turns into first-fit decreasing, and may miss
    a solution that Ray's own greedy search would not find either.
    """
    keys = [(amounts, tuple(row)) for amounts, row in zip(asked, allowed, strict=True)]
    count = Counter(keys)
    kinds = sorted(count, key=lambda kind: _size(kind[0]), reverse=True)
    wanted_by = [([kind], count[kind]) for kind in kinds] + [(kinds, len(asked))]
    if any(_capacity(some, room, number) < number for some, number in wanted_by):
        return None
    hosts = [node for node, has in enumerate(room) if any(row[node] and _fits(amounts, has) for amounts, row in kinds)]
    hosts.sort(key=lambda node: _size(room[node]), reverse=True)
    states: list[_State] = [tuple(count[kind] for kind in kinds)]
    filled: list[tuple[int, dict[_State, _State]]] = []  # node, state after → state before
    for node in hosts:
        wanted = [amounts if row[node] else None for amounts, row in kinds]
        patience = max(1, _MOST_FILLINGS // (len(hosts) * len(states)))
        before: dict[_State, _State] = {}
        for state in states:
            for filling in islice(_fillings(wanted, state, room[node]), patience):
                before.setdefault(tuple(left - placed for left, placed in zip(state, filling, strict=True)), state)
        states = _undominated(list(before), max(1, _MOST_STATES // len(kinds)))
        filled.append((node, before))
        if not any(states[0]):
            return _walk_back(keys, kinds, filled)
    return None


def _size(amounts: Amounts) -> Amounts:
    """What orders bundles and nodes: GPUs are the scarcest, then memory."""
    cpus, gpus, memory = amounts
    return gpus, memory, cpus


def _fits(amounts: Amounts, has: Amounts) -> bool:
    return all(asked <= free for asked, free in zip(amounts, has, strict=True))


def _capacity(kinds: Sequence[_Kind], room: Sequence[Amounts], enough: int) -> int:
    """At most how many bundles of these kinds fit, up to `enough`: as if each asked the least of everything."""
    least = tuple(min(amounts) for amounts in zip(*(amounts for amounts, _ in kinds), strict=True))
    total = 0
    for node, has in enumerate(room):
        if any(row[node] for _, row in kinds):
            total += min((free // asked for free, asked in zip(has, least, strict=True) if asked), default=enough)
    return min(total, enough)


def _fillings(wanted: Sequence[Amounts | None], left: Sequence[int], has: Amounts) -> Iterator[_State]:
    """Ways to fill one node, by count of each kind; the last kind always takes all that it can."""
    amounts, num_left = wanted[0], left[0]
    most = 0
    if amounts is not None and num_left:
        most = min([num_left, *(free // asked for free, asked in zip(has, amounts, strict=True) if asked)])
    for num in range(most, -1 if len(wanted) > 1 else most - 1, -1):
        if len(wanted) == 1:
            yield (num,)
        else:
            rest = has if amounts is None else tuple(f - num * a for f, a in zip(has, amounts, strict=True))
            for others in _fillings(wanted[1:], left[1:], rest):
                yield (num, *others)


def _undominated(states: list[_State], most: int) -> list[_State]:
    """States of which no other has as little or less left of every kind; those with the least left come first."""
    kept: list[_State] = []
    for state in sorted(states, key=sum):
        if not any(all(a <= b for a, b in zip(other, state, strict=True)) for other in kept):
            kept.append(state)
            if len(kept) == most:
                break
    return kept


def _walk_back(
    keys: Sequence[_Kind], kinds: Sequence[_Kind], filled: Sequence[tuple[int, dict[_State, _State]]]
) -> list[int]:
    """Node by bundle, from the last node's filling to the first one's."""
    bundles: dict[_Kind, list[int]] = {kind: [] for kind in kinds}
    for bundle, key in enumerate(keys):
        bundles[key].append(bundle)
    nodes = [-1] * len(keys)
    state: _State = (0,) * len(kinds)
    for node, before in reversed(filled):
        earlier = before[state]
        for kind, had, has in zip(kinds, earlier, state, strict=True):
            for _ in range(had - has):
                nodes[bundles[kind].pop()] = node
        state = earlier
    return nodes
