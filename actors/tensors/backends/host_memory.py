"""Reads how much main memory a process may still take, by what the node has and what its control group allows."""

from pathlib import Path


def available_bytes() -> int:
    """Bytes of memory that a process may still take on this node and in this container."""
    available = _available_on_node(Path("/proc/meminfo"))
    return max(0, min(available, _available_in_container(Path("/sys/fs/cgroup"), available)))


def _available_on_node(meminfo: Path) -> int:
    """The kernel's own estimate of what may be taken without swapping, in bytes (proc_meminfo(5))."""
    for line in meminfo.read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.removesuffix("kB")) * 1024
    raise RuntimeError(f"{meminfo} names no MemAvailable")


def _available_in_container(cgroup: Path, otherwise: int) -> int:
    """What the control group's limit leaves, in bytes; page cache that can be dropped counts as free.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return otherwise if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):  # no such file system here
        return otherwise
