"""What is read from one node, as plain data; a probe writes it as JSON, a section a line."""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from cluster.placement.interfaces import Interface
from cluster.placement.nvml import NodeGpus


@dataclass(frozen=True)
class Asked:
    """What a probe is told of the config: all of it as the config says."""

    source: str | None = None  # model.source; None: no config was given
    revision: str | None = None
    http_port: int | None = None
    cache_folder: str | None = None


@dataclass(frozen=True)
class Limits:
    """What one process may use."""

    open_files: int
    locked_bytes: int  # -1: any number


@dataclass(frozen=True)
class SharedMemory:
    """The file system /dev/shm."""

    size_bytes: int
    free_bytes: int
    stale: tuple[str, ...]  # segments of NCCL and torch that no process maps
    stale_bytes: int


@dataclass(frozen=True)
class Disk:
    """Where the checkpoint lies, or will lie."""

    folder: str
    free_bytes: int
    stored_bytes: int  # of the checkpoint; 0: it is not there
    read_bytes_per_s: float | None  # past the page cache; None: it could not be read so
    sample_bytes: int


@dataclass(frozen=True)
class Network:
    """Names, addresses and fast network cards of a node."""

    hostname: str
    resolves_to: tuple[str, ...]  # empty: it does not
    interfaces: tuple[Interface, ...]
    rdma: dict[str, str] = field(default_factory=dict)  # by InfiniBand or RoCE port, its state


@dataclass(frozen=True)
class Hub:
    """What the hub says of a model id."""

    endpoint: str
    status: int | None  # of a HEAD for its config.json; None: not reached
    reason: str  # why it was not reached
    has_token: bool
    model_bytes: int | None  # of its safetensors


@dataclass(frozen=True)
class Bucket:
    """What the object store says of a checkpoint's URL."""

    url: str
    problem: str | None  # None: it is there and open to us


@dataclass(frozen=True)
class Cuda:
    """Whether CUDA starts, and NVIDIA GPUs on the PCI bus, whether or not a driver knows them."""

    init_code: int | None  # cuInit's; None: there is no libcuda
    on_bus: int


SECTIONS: dict[str, Any] = {
    "checkpoint": str | None,  # why model.source is refused there
    "versions": dict[str, str],
    "limits": Limits,
    "shm": SharedMemory,
    "disk": Disk | None,
    "network": Network,
    "environment": dict[str, str],
    "hub": Hub | None,
    "bucket": Bucket | None,
    "gpus": NodeGpus | None,
    "cuda": Cuda,
    "http_port": bool | None,  # whether it is free
}


@dataclass
class NodeFacts:
    """One node: its sections by name, and why others could not be read."""

    name: str
    address: str | None  # Ray's; None: Ray was not asked
    hosts_ranks: bool = True  # else it is a head, or has too little for a stage
    sections: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    is_silent: str | None = None  # why nothing at all could be read
    free_gpus: float | None = None  # that Ray has not given away; None: Ray was not asked
    skew_s: float | None = None  # its clock less this one's; None: not measured
    skew_error_s: float = 0.0

    def take(self, lines: bytes, within_s: float) -> None:
        """Add what a probe has written. Sections that are not there have hung."""
        for line in lines.splitlines():
            written = msgspec.json.decode(line, type=Written)
            if written.section not in SECTIONS:
                continue  # of other sources, which the versions tell
            if written.error is not None:
                self.unread[written.section] = written.error
            else:
                self.sections[written.section] = msgspec.convert(written.facts, SECTIONS[written.section])
        for name in SECTIONS.keys() - self.sections.keys() - self.unread.keys():
            self.unread[name] = f"it took longer than {within_s:g} s"


class Written(msgspec.Struct):
    """A line of a probe."""

    section: str
    facts: Any = None
    error: str | None = None
