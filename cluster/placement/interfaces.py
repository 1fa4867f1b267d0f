"""The network interfaces of this machine that have an address, and which of them NCCL or gloo would use."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Interface:
    """One of them."""

    name: str
    address: str


def read_interfaces() -> tuple[Interface, ...]:
    """All that are up. One with several addresses is there several times, with IPv4 first.

    IPv6 addresses that need a scope are left out. What a label names (`eth0:1`) is an address of its interface.
    """
    states, labels = psutil.net_if_stats(), psutil.net_if_addrs().items()
    found = []
    for family in _FAMILIES:
        for label, addresses in labels:
            name = label.partition(":")[0]
            state = states.get(name)
            if state is not None and state.isup:
                own = [one.address for one in addresses if one.family == family and "%" not in one.address]
                found += [Interface(name, address) for address in own]
    return tuple(found)


def chosen(spec: str, interfaces: Iterable[Interface]) -> list[Interface]:
    """Those that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME means: beginnings of names, `=` whole names, `^` all others.

    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
    """
    is_excluding, is_whole = spec.startswith("^"), spec.lstrip("^").startswith("=")
    names = tuple(name for name in spec.lstrip("^").lstrip("=").split(",") if name)
    hits = [one.name in names if is_whole else one.name.startswith(names) for one in interfaces]
    return [one for one, hit in zip(interfaces, hits, strict=True) if hit != is_excluding]
