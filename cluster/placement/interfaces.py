"""The network interfaces of this machine that have an IPv4 address, and which of them NCCL or gloo would use."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Interface:
    """One of them."""

    name: str
    address: str
    mtu: int
    bytes_per_s: int | None  # as its driver says


def read_interfaces() -> tuple[Interface, ...]:
    """All that are up; one with several addresses is there several times."""
    states = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        state = states.get(name)
        if state is not None and state.isup:
            rate = state.speed * 1_000_000 // 8 or None  # psutil's unit is Mbit/s; 0: not known
            found += [
                Interface(name, one.address, state.mtu, rate) for one in addresses if one.family == socket.AF_INET
            ]
    return tuple(found)


def chosen(spec: str, interfaces: Iterable[Interface]) -> list[Interface]:
    """Those that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME means: beginnings of names, `=` whole names, `^` all others.

    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
    """
    is_excluding, is_whole = spec.startswith("^"), spec.lstrip("^").startswith("=")
    names = tuple(name for name in spec.lstrip("^").lstrip("=").split(",") if name)
    hits = [one.name in names if is_whole else one.name.startswith(names) for one in interfaces]
    return [one for one, hit in zip(interfaces, hits, strict=True) if hit != is_excluding]
