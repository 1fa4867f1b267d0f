"""Finds nodes that do not reach each other, before ranks wait in vain: by Ray's ports and by the ranks' own."""

import time
from collections.abc import Callable, Sequence, Set
from typing import Any

from cluster.collectives.network import REFUSED, Failure, Place, check_distinct, knock, told

_KNOCK_S = 4.0  # a lost packet is sent again after 1 s, and after 3 s
_PAUSE_S = 1.0


class Unreachable(ValueError):
    """Nodes do not reach each other, which has been tried long enough. Handled at the start, and by the gang."""


def check_ranks_reach(
    gather: Callable[[list[Any], str], list[Any]],
    actors: Sequence[Any],
    places: Sequence[Place],
    own: Place,
    port: int,
    patience_s: float,
) -> None:
    """Let every rank try to connect to all other nodes, and to this process at `port` (the step channel).

    `gather` waits for one call a rank; `places` are those of the actors. What fails is tried again until `patience_s`
    is over. Raises Unreachable, which names nodes, address, port and remedy. Does nothing where all are on one node.
    """
    if {place.node for place in places} == {own.node}:
        return
    check_distinct([own, *places])
    deadline = time.monotonic() + patience_s
    ports = gather([actor.open_door.remote() for actor in actors], "opened a port for the others")
    doors = {place.node: (place, port) for place, port in reversed(list(zip(places, ports, strict=True)))}
    goals = [*doors.values(), (own, port)]
    while failures := _failures(gather, actors, places, goals):
        if time.monotonic() > deadline:
            raise Unreachable(told(failures))
        time.sleep(_PAUSE_S)
    for actor in actors:
        actor.close_door.remote()


def check_ray_reaches(
    goals: Sequence[tuple[Place, int]], own: Place, unheard: Set[tuple[Place, int]]
) -> set[tuple[Place, int]]:
    """Try the ports where actors listen, as Ray says → those that do not answer here: no call to them would end.

    Raises Unreachable for one of `unheard`, which did not answer the last time: a machine that is busy is late once.
    """
    reasons = knock([(goal.address, port) for goal, port in goals], _KNOCK_S)
    # Where a port is refused the actor has ended, which Ray will say
    late = {goal: why for goal, why in zip(goals, reasons, strict=True) if why and why != REFUSED}
    for goal, port in late.keys() & unheard:
        why = f"{late[goal, port]} (it is a port of Ray's workers, whose range `ray start` sets)"
        raise Unreachable(told([Failure(own, goal, port, why)]))
    return set(late)


def _failures(
    gather: Callable[[list[Any], str], list[Any]],
    actors: Sequence[Any],
    places: Sequence[Place],
    goals: list[tuple[Place, int]],
) -> list[Failure]:
    """Every rank tries every goal on another node → what fails, once for each two nodes."""
    tries = [[(goal, port) for goal, port in goals if goal.node != place.node] for place in places]
    calls = [
        actor.knock.remote([(goal.address, port) for goal, port in tried], _KNOCK_S)
        for actor, tried in zip(actors, tries, strict=True)
    ]
    failures = [
        Failure(place, goal, port, why)
        for place, tried, reasons in zip(places, tries, gather(calls, "tried to reach the other nodes"), strict=True)
        for (goal, port), why in zip(tried, reasons, strict=True)
        if why
    ]
    return list({(one.source.node, one.goal.node): one for one in reversed(failures)}.values())[::-1]
