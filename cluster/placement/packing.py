"""Puts bundles on nodes: the search behind placement, on whole numbers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from cluster.placement.resources import Amounts

_Kind = tuple[Amounts, tuple[bool, ...]]  # what a bundle asks for, and on which nodes it may be
_State = tuple[int, ...]  # how many bundles of each kind are still to be placed
_MOST_STATES = 128  # kept after each node, divided by the number of kinds
_MOST_FILLINGS = 20_000  # tried in all: about a second


def spread(asked: Sequence[Amounts], room: Sequence[Amounts], allowed: Sequence[Sequence[bool]]) -> list[int] | None:
    """A different node for each bundle; None where that is impossible. Exact: a matching by augmenting paths."""
    fitting = [
        [node for node, has in enumerate(room) if row[node] and _fits(amounts, has)]
        for amounts, row in zip(asked, allowed, strict=True)
    ]
    holder: dict[int, int] = {}  # node → bundle

    def assign(bundle: int, seen: set[int]) -> bool:
        free = next((node for node in fitting[bundle] if node not in holder), None)
        if free is not None:
            holder[free] = bundle
            return True
        for node in fitting[bundle]:
            if node not in seen:
                seen.add(node)
                if assign(holder[node], seen):
                    holder[node] = bundle
                    return True
        return False

    if not all(assign(bundle, set()) for bundle in range(len(asked))):
        return None
    nodes = {bundle: node for node, bundle in holder.items()}
    return [nodes[bundle] for bundle in range(len(asked))]


def pack(asked: Sequence[Amounts], room: Sequence[Amounts], allowed: Sequence[Sequence[bool]]) -> list[int] | None:
    """A node for each bundle, where several may share one; None where none is found.

    Equal bundles are of one kind. A state is how many of each kind are still to be placed. Node after node, largest
    first, every way to fill the node is tried on every state, and the states are kept of which no other has less left
    of everything. Exact for the few kinds that pipelines have (the first stage, and others that differ by a layer or
    two); with many kinds it becomes first-fit decreasing, and may miss a solution that Ray's greedy search misses too.
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
    """The order of bundles and nodes by size: GPUs first, as the scarcest, then memory."""
    cpus, gpus, memory = amounts
    return gpus, memory, cpus


def _fits(amounts: Amounts, has: Amounts) -> bool:
    return all(asked <= free for asked, free in zip(amounts, has, strict=True))


def _capacity(kinds: Sequence[_Kind], room: Sequence[Amounts], enough: int) -> int:
    """At most how many bundles of these kinds fit, up to `enough`: as if each asked for the least of every resource."""
    least = tuple(min(amounts) for amounts in zip(*(amounts for amounts, _ in kinds), strict=True))
    total = 0
    for node, has in enumerate(room):
        if any(row[node] for _, row in kinds):
            total += min((free // asked for free, asked in zip(has, least, strict=True) if asked), default=enough)
    return min(total, enough)


def _fillings(wanted: Sequence[Amounts | None], left: Sequence[int], has: Amounts) -> Iterator[_State]:
    """The ways to fill one node, as counts of each kind; of the last kind always as many as fit."""
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
    """Up to `most` states, least left first, without states that have no less left of any kind than another one."""
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
    """The node of each bundle, from how the nodes were filled, last one first."""
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
