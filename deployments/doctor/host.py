"""Reads limits, shared memory, network, versions and environment of this machine, each on its own."""

import ctypes
import errno
import hashlib
import os
import platform
import resource
import socket
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.placement.interfaces import read_interfaces
from configs.files import PROJECT_ROOT
from deployments.doctor.facts import Cuda, Limits, Network, SharedMemory

_PACKAGES = ("ray", "torch", "transformers")
_NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
_FLOORS = ("configs", "cluster", "actors", "deployments")
_PREFIXES = ("RAY_", "NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "CUDA_", "HF_", "OMP_")
_SECRET = ("TOKEN", "PASSWORD", "SECRET", "KEY")
_SEGMENTS = ("nccl-", "torch_")
_NVIDIA = "0x10de"  # the vendor's number on the PCI bus


def read_versions() -> dict[str, str]:
    """What must be the same on all nodes, by name."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in (*_PACKAGES, *_NCCL):
        with suppress(PackageNotFoundError):
            found["nccl" if package in _NCCL else package] = version(package)
    digest = hashlib.sha256()
    for floor in _FLOORS:
        for path in sorted((PROJECT_ROOT / floor).rglob("*.py")):
            digest.update(path.relative_to(PROJECT_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    found["stagemesh"] = f"sources {digest.hexdigest()[:12]}"
    return found


def read_limits() -> Limits:
    """The limits of this process, which are those of what Ray starts on this node."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Limits(resource.getrlimit(resource.RLIMIT_NOFILE)[0], -1 if locked < 0 else locked)


def read_shared_memory(folder: Path = Path("/dev/shm")) -> SharedMemory:  # noqa: S108 - the kernel's place for it
    """Size, room, and what killed ranks have left."""
    found = os.statvfs(folder)
    stale = [path for path in folder.iterdir() if path.name.startswith(_SEGMENTS)]
    stale = [path for path in stale if path.is_file() and not _is_mapped(path)] if stale else []
    size = sum(path.stat().st_size for path in stale)
    return SharedMemory(
        found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, tuple(path.name for path in stale), size
    )


def _is_mapped(segment: Path) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(segment) in maps.read_text():
                return True
    return False


def read_network() -> Network:
    """Own name, what it resolves to, and all interfaces."""
    name = socket.gethostname()
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        found = set()
    return Network(name, tuple(sorted(found)), read_interfaces(), _rdma())


def _rdma() -> dict[str, str]:
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*/state"))
    return {f"{path.parts[-4]} port {path.parts[-2]}": path.read_text().strip() for path in ports}


def read_environment() -> dict[str, str]:
    """What Ray, NCCL, gloo, CUDA and the hub's client read; of secrets only that they are set."""
    chosen = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    return {name: "set" if any(part in name for part in _SECRET) else value for name, value in chosen.items()}


def read_cuda() -> Cuda:
    """Starts CUDA without a context: no GPU's memory is touched."""
    on_bus = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            is_display = (device / "class").read_text().startswith("0x03")
            on_bus += is_display and (device / "vendor").read_text().strip() == _NVIDIA
    try:
        return Cuda(int(ctypes.CDLL("libcuda.so.1").cuInit(0)), on_bus)
    except OSError:
        return Cuda(None, on_bus)


def is_port_free(port: int | None) -> bool | None:
    """Whether nothing listens on a port of this machine; None where no port is asked for."""
    if port is None:
        return None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True
