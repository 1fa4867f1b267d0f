"""Main memory: how much a process may still take, by node and control group, and how much a piece of work takes."""

import contextlib
from collections.abc import Callable
from pathlib import Path


def growth_during(work: Callable[[], None]) -> int:
    """Run a piece of work → the most bytes by which this process grew meanwhile."""
    with contextlib.suppress(OSError):  # without it, an earlier peak counts too, which is more
        Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is taken now: proc_pid_clear_refs(5)
    before = _taken("VmRSS")
    work()
    return _taken("VmHWM") - before


def _taken(name: str) -> int:
    """A field of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


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
