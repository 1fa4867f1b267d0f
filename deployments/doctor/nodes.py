"""Looks at every node of the cluster: an actor on each, without CPUs, whose silence hides no other node."""

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.collectives.network import knock, open_door, own_place
from cluster.placement.resources import NodeFree
from deployments.doctor.cluster_findings import Way
from deployments.doctor.facts import Asked, NodeFacts
from deployments.doctor.probe import run_probe

_START_S = 25.0  # for an actor's process
_READ_S = 15.0  # for the sections of a node
_REACH_S = 3.0  # for one connection
_SPARE_S = 15.0  # for a call to come back, beyond what it does
_REPLICA_PORTS = (30000, 31000)  # of Serve's replicas behind HAProxy: the first and the last one


class NodeProbe:
    """What runs on one node."""

    def __init__(self) -> None:
        self._listeners: list[socket.socket] = []

    def now(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def address(self, interface: str | None) -> str:
        """Where ranks of this node would listen, by `network.interface`. Raises ValueError where it is not there."""
        return own_place(interface).address

    def read(self, asked: Asked, within_s: float) -> bytes:
        """What a probe writes: see NodeFacts.take."""
        return run_probe(asked, within_s)

    def listen(self, address: str, ports: Sequence[int]) -> list[tuple[int, str | None]]:
        """Listen at this node's own address → (port, None), or why nobody answers there. 0: the kernel chooses one."""
        found: list[tuple[int, str | None]] = []
        for port in ports:
            try:
                listener, opened = open_door(address, port)
            except OSError as error:
                # In use: then that one answers
                found.append((port, None if error.errno == errno.EADDRINUSE else str(error)))
            else:
                self._listeners.append(listener)
                found.append((opened, None))
        return found

    def reach(self, targets: Sequence[tuple[str, int]], within_s: float) -> list[str | None]:
        """Connect to all targets at once → None, or what went wrong, by target."""
        return knock(targets, within_s)


class Nodes:
    """The actors on all living nodes, and what they have found."""

    def __init__(self, alive: Sequence[NodeFree], addresses: dict[str, str], hosts: set[str]) -> None:
        """`addresses` by node id; `hosts`: ids of nodes that would host ranks."""
        self.facts = {
            node.node_id: NodeFacts(node.name, addresses[node.node_id], node.node_id in hosts, free_gpus=node.free_gpus)
            for node in alive
        }
        self._actors = {
            node.node_id: ray.remote(NodeProbe)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))
            .remote()
            for node in alive
        }

    def look(self, asked: Asked, interface: str | None) -> None:
        """Read addresses, clocks and all sections of all nodes. `interface`: as `network.interface` says."""
        hosts = {actor for node_id, actor in self._actors.items() if self.facts[node_id].hosts_ranks}
        found = self._each(lambda actor: actor.address.remote(interface if actor in hosts else None), _START_S)
        for node_id, address in found.items():
            self.facts[node_id].address = address
        for node_id, actor in self._actors.items():
            self._read_clock(self.facts[node_id], actor)
        for node_id, lines in self._each(lambda actor: actor.read.remote(asked, _READ_S), _READ_S + _SPARE_S).items():
            self.facts[node_id].take(lines, _READ_S)

    def try_ways(self, head: tuple[str, int]) -> list[Way]:
        """Connect every node to ports of every other one, and to Ray's own on the head."""
        addresses = {node_id: facts.address or "" for node_id, facts in self.facts.items()}
        opened, ways = self._open_ports(addresses)
        calls = {}
        for node_id, actor in self._actors.items():
            targets = [(addresses[other], port) for other in opened if other != node_id for port in opened[other]]
            targets += [head] if addresses[node_id] != head[0] else []
            calls[node_id] = (targets, actor.reach.remote(targets, _REACH_S))
        for node_id, (targets, call) in calls.items():
            try:
                errors = ray.get(call, timeout=_REACH_S + _SPARE_S)
            except (RayError, TimeoutError):
                errors = ["the node did not answer"] * len(targets)
            ways += [
                Way(addresses[node_id], address, port, _meaning(port, (address, port) == head), error)
                for (address, port), error in zip(targets, errors, strict=True)
            ]
        return ways

    def _open_ports(self, addresses: dict[str, str]) -> tuple[dict[str, list[int]], list[Way]]:
        """Let every node listen → ports by node, and what cannot be tried."""
        is_serving = _serves()
        # Serve gives no replica a port that was once taken, if only by us
        ports = (0,) if is_serving else (0, *_REPLICA_PORTS)
        opened: dict[str, list[int]] = {}
        untried = []
        for node_id, actor in self._actors.items():
            try:
                found = ray.get(actor.listen.remote(addresses[node_id], ports), timeout=_SPARE_S)
            except (RayError, TimeoutError):
                found = [(port, "the node did not answer") for port in ports]
            if is_serving:
                found = [
                    *found,
                    *((port, "it is left to the replicas of what is served now") for port in _REPLICA_PORTS),
                ]
            opened[node_id] = [port for port, why in found if why is None]
            own = addresses[node_id]
            untried += [Way(own, own, port, _meaning(port, False), why, False) for port, why in found if why]
        return opened, untried

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors.values():
            ray.kill(actor)

    def _each(self, call: Callable[[Any], Any], within_s: float) -> dict[str, Any]:
        """One call a node, all at once → results by node id; who does not answer is silent from then on."""
        calls = {node_id: call(actor) for node_id, actor in self._actors.items()}
        deadline, results = time.monotonic() + within_s, {}
        for node_id, reference in calls.items():
            try:
                results[node_id] = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
            except (RayError, TimeoutError) as error:
                late = isinstance(error, TimeoutError)
                why = f"no answer within {within_s:g} s" if late else f"it does not answer: {_last(error)}"
                if isinstance(cause := getattr(error, "cause", None), ValueError):
                    why = str(cause)  # of ours, with its remedy
                self.facts[node_id].is_silent = why
                ray.kill(self._actors.pop(node_id))
        return results

    def _read_clock(self, facts: NodeFacts, actor: Any) -> None:
        """By the quickest of three questions: the answer was made between asking and hearing."""
        tries = []
        for _ in range(3):
            asked = time.time()
            with contextlib.suppress(RayError, TimeoutError):
                told = ray.get(actor.now.remote(), timeout=_REACH_S)
                heard = time.time()
                tries.append(((heard - asked) / 2, told - (asked + heard) / 2))
        if tries:
            facts.skew_error_s, facts.skew_s = min(tries)


@contextlib.contextmanager
def looked_at(alive: Sequence[NodeFree], hosts: set[str]) -> Iterator[Nodes]:
    """The nodes with an actor each, which are ended afterwards."""
    nodes = Nodes(alive, {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes()}, hosts)
    try:
        yield nodes
    finally:
        nodes.close()


def head_address() -> tuple[str, int]:
    """Where Ray's own server of the cluster listens."""
    address, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return address, int(port)


def _meaning(port: int, is_head: bool) -> str:
    if is_head:
        return "Ray's server on the head"
    return "a replica behind HAProxy" if port in _REPLICA_PORTS else "workers and ranks: a port of the kernel's choice"


def _serves() -> bool:
    """Whether Serve runs something on this cluster."""
    from ray import serve  # it takes a second, which probes on nodes do not need

    return bool(serve.status().applications)


def _last(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
