"""Compiles the kernels of the CPU backend: which sources their machine code depends on."""

from pathlib import Path

from cluster.collectives import compile as collectives
from cluster.collectives.compile import kernels_of

__all__ = ["SOURCES", "kernel"]

_HERE = Path(__file__).parent
# The kernels call those of the exchange between shards, and share constants with the sampling on other devices.
SOURCES = (Path(collectives.__file__).parent, _HERE.parents[1] / "sampling", _HERE)
kernel = kernels_of(*SOURCES)
