"""The network interface on which a process listens, and whether it reaches others: one error names who does not."""

import logging
import os
import socket
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray

from cluster.placement.interfaces import read_interfaces

logger = logging.getLogger(__name__)

REFUSED = "connection refused"


@dataclass(frozen=True)
class Place:
    """Where a process listens."""

    node: str  # Ray's id
    host: str
    interface: str  # its name; empty where no interface has the address
    address: str

    def __str__(self) -> str:
        """As people read it."""
        return f"{self.host} ({', '.join(filter(None, (self.interface, self.address)))})"


@dataclass(frozen=True)
class Failure:
    """A connection that failed."""

    source: Place
    goal: Place
    port: int
    why: str


def own_place(asked: str | None) -> Place:
    """The place of this process, which Ray runs. `asked` and errors: see `find_place`."""
    return find_place(asked, ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())


def find_place(asked: str | None, node: str, node_address: str) -> Place:
    """The place of this process. `asked`: `network.interface`; None: the interface that has the node's address.

    Raises ValueError when this node has no such interface, or it has no address.
    """
    host, addresses = socket.gethostname(), _addresses()
    if asked is None:
        own = (name for name, found in addresses.items() if node_address in found)
        return Place(node, host, next(own, ""), node_address)
    for wanted in (word.strip() for word in asked.split(",")):
        prefix = wanted.removesuffix("*")
        for name, found in sorted(addresses.items()):
            if name == wanted or (prefix != wanted and name.startswith(prefix)):
                return Place(node, host, name, found[0])
    there = ", ".join(f"{name} {found[0]}" for name, found in sorted(addresses.items()))
    raise ValueError(
        f"network.interface: {asked}: node {host} ({node_address}) has no such interface that is up and has an "
        f"address; it has {there}; name one that every node has, or several: eth0, ens*"
    )


def _addresses() -> dict[str, list[str]]:
    """The addresses of each interface that is up, IPv4 first."""
    found = defaultdict[str, list[str]](list)
    for one in read_interfaces():
        found[one.name].append(one.address)
    return found


def pin_interface(name: str) -> None:
    """Make NCCL and gloo, which read it from their environment only, use an interface. A value that is there stays.

    Does nothing where the name is empty.
    """
    if not name:
        return
    for key, value in (("NCCL_SOCKET_IFNAME", f"={name}"), ("GLOO_SOCKET_IFNAME", name)):
        said = os.environ.setdefault(key, value)
        if said not in (name, value):
            logger.warning("%s=%s is set and stays, though ranks listen on %s (network.interface)", key, said, name)


def check_distinct(places: Sequence[Place]) -> None:
    """Raises ValueError where two nodes have one address, as on bridges that each node has for itself."""
    seen: dict[str, Place] = {}
    for place in places:
        other = seen.setdefault(place.address, place)
        if other.node != place.node:
            raise ValueError(
                f"network: {other} and {place} are two nodes with one address, so they do not reach each other; name "
                "the interface that joins the nodes in network.interface"
            )


def open_door(address: str, port: int = 0) -> tuple[socket.socket, int]:
    """Listen at an address for `knock` → (the listener, its port). The kernel answers; the caller closes it.

    `port` 0: the kernel chooses one. Raises OSError.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    door = socket.create_server((address, port), family=family, backlog=256)
    return door, int(door.getsockname()[1])


def knock(doors: Sequence[tuple[str, int]], timeout_s: float) -> list[str | None]:
    """Try to connect to each (address, port), all at once → why it failed; None where it did not."""

    def try_one(door: tuple[str, int]) -> str | None:
        try:
            socket.create_connection(door, timeout=timeout_s).close()
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except ConnectionRefusedError:
            return REFUSED
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return None

    with ThreadPoolExecutor(max(1, min(64, len(doors)))) as threads:
        return list(threads.map(try_one, doors))


def told(failures: Sequence[Failure]) -> str:
    """What people get to read of connections that failed."""
    lines = [f"  {one.source} does not reach {one.goal}, port {one.port}: {one.why}" for one in failures]
    ports = Path("/proc/sys/net/ipv4/ip_local_port_range")
    chosen = " to ".join(ports.read_text().split()) if ports.exists() else "1024 to 65535"
    remedy = (
        f"open TCP between all nodes in firewalls and security groups (ranks listen on ports {chosen}), or name the "
        "interface that joins the nodes in network.interface"
    )
    return "\n".join(["network: nodes of this gang do not reach each other:", *lines, remedy])
