"""Compiles kernels with numba and keeps them on disk, in a folder named by a digest of all their sources.

numba's own cache is keyed by the file that holds a kernel. A kernel that inlines a function of another file, or takes a
constant from it, would stay as it was when that file changes; in a folder of another name nothing stale is found.
"""

import hashlib
import logging
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import llvmlite
import numba
import numpy as np

logger = logging.getLogger(__name__)

# Sums may be taken in any order; NaN stays NaN, so that a fault shows in the end.
REORDERING = frozenset({"reassoc", "contract", "arcp", "nsz"})
_CACHE_DIR_LOCK = threading.Lock()  # numba reads its folder from one global while it decorates

Function = TypeVar("Function", bound=Callable[..., Any])


class KernelDecorator(Protocol):
    """What `kernels_of` returns."""

    def __call__(self, *, fastmath: Collection[str] | bool = REORDERING) -> Callable[[Function], Function]:
        """Make a decorator that compiles a function on its first call, with LLVM's fast-math flags of these names."""
        ...


def kernels_of(*folders: Path) -> KernelDecorator:
    """Kernels whose machine code depends on the Python sources of these folders, and on no others.

    They are kept in the last folder's __pycache__, else in the user's cache folder; compiled in each process where
    neither can be written to. They run without the GIL, and divide by zero as numpy does.
    """
    name = f"kernels-{_digest(folders)}"
    candidates = (lambda: folders[-1] / "__pycache__", lambda: Path.home() / ".cache" / "stagemesh")
    cache_folder = next(filter(None, (_made(candidate, name) for candidate in candidates)), None)
    if cache_folder is None:
        logger.warning("kernels of %s are compiled at each start: neither it nor the home can be written", folders[-1])

    def kernel(*, fastmath: Collection[str] | bool = REORDERING) -> Callable[[Function], Function]:
        flags = fastmath if isinstance(fastmath, bool) else set(fastmath)

        def decorate(function: Function) -> Function:
            options = {"nogil": True, "error_model": "numpy", "fastmath": flags, "cache": cache_folder is not None}
            with _CACHE_DIR_LOCK:
                before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_folder or "")
                try:
                    compiled: Function = numba.njit(**options)(function)
                finally:
                    numba.config.CACHE_DIR = before
            return compiled

        return decorate

    return kernel


def _digest(folders: Iterable[Path]) -> str:
    """Of every source below the folders, with its path there, and of the versions of what compiles them."""
    digest = hashlib.sha256(repr((numba.__version__, llvmlite.__version__, sys.version, np.__version__)).encode())
    for number, folder in enumerate(folders):
        for path in sorted(folder.rglob("*.py")):
            source = path.read_bytes()
            digest.update(repr((number, path.relative_to(folder).as_posix(), len(source))).encode())
            digest.update(source)
    return digest.hexdigest()[:16]


def _made(parent: Callable[[], Path], name: str) -> Path | None:
    """Make a folder that files can be written to, or answer None."""
    try:
        folder = parent() / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: nobody has a home here
        return None


KERNELS = _digest([Path(__file__).parent])  # tells apart versions of this folder's kernels
kernel = kernels_of(Path(__file__).parent)
