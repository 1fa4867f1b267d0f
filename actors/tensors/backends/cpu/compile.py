"""The decorator that compiles the CPU backend's kernels, with the sources on which their machine code depends."""

from pathlib import Path

from cluster.collectives import compile as collectives
from cluster.collectives.compile import kernels_of

__all__ = ["SOURCES", "kernel"]

_HERE = Path(__file__).parent
# The kernels inline those of the exchange between shards, and take constants from the sampling in torch.
SOURCES = (Path(collectives.__file__).parent, _HERE.parents[1] / "sampling", _HERE)
kernel = kernels_of(*SOURCES)
