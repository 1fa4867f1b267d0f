"""A node's disk: whether it has room, files that are there whole or not at all, and a lock among processes."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from actors.words.errors import CheckpointError

ROOM = "set model.cache_folder to a folder on a disk with room, which this user may write"


def check_room(folder: Path, lacking: int, url: str) -> None:
    """Raises CheckpointError unless the disk has room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < lacking:
        raise CheckpointError(
            f"model.source: {lacking / 1e9:.3f} GB of {url} are still to be fetched, but the disk of {folder} has "
            f"{free / 1e9:.3f} GB left; make room (copies of other versions lie beside it), or {ROOM}"
        )


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of the node at a time; the kernel frees the lock of a process that ends, however it ends."""
    with path.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
