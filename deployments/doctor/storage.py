"""Reads where the checkpoint of this node lies, how much room is there, and how fast it can be read."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from actors.tensors.weights.source import cache_folder, local_folder
from deployments.doctor.facts import Asked, Disk

_SAMPLE_BYTES = 64 << 20
_SAMPLE_S = 3.0
_PIECE_BYTES = 4 << 20  # a multiple of every disk's block, as O_DIRECT wants

ReadAt = Callable[[int, mmap.mmap, int], int]  # (file, buffer, offset) → bytes read; like os.preadv


def refusal(asked: Asked) -> str | None:
    """Why model.source is refused on this machine, with the remedy; None: it is not."""
    try:
        if asked.source is not None:
            local_folder(asked.source, asked.revision)
    except ValueError as error:
        return str(error)
    return None


def read_disk(asked: Asked) -> Disk | None:
    """The disk of the checkpoint, or where it would be put; None without a config, or where the source is refused."""
    if asked.source is None or refusal(asked) is not None:
        return None
    folder = local_folder(asked.source, asked.revision) or cache_folder(
        asked.source, asked.revision, asked.cache_folder
    )
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    stored = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    room = os.statvfs(place)
    rate, sample = _measure(stored[-1] if stored else None, place)
    return Disk(str(folder), room.f_bavail * room.f_frsize, sum(path.stat().st_size for path in stored), rate, sample)


def _measure(stored: Path | None, folder: Path) -> tuple[float | None, int]:
    if stored is not None:
        return read_rate(stored)
    with (
        suppress(OSError),
        tempfile.TemporaryFile(dir=folder) as made,
    ):  # without a name: nothing stays, whatever ends us
        for _ in range(_SAMPLE_BYTES // _PIECE_BYTES):
            made.write(os.urandom(_PIECE_BYTES))
        made.flush()
        os.fsync(made.fileno())
        return read_rate(Path(f"/proc/self/fd/{made.fileno()}"))
    return None, 0  # a folder that cannot be written to


def read_rate(
    path: Path, read_at: ReadAt = lambda file, buffer, offset: os.preadv(file, [buffer], offset)
) -> tuple[float | None, int]:
    """(bytes a second, bytes read) of a file past the page cache, from its middle on, for at most _SAMPLE_S."""
    size = path.stat().st_size
    first = size // 2 // _PIECE_BYTES * _PIECE_BYTES if size > _SAMPLE_BYTES else 0
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without it
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with mmap.mmap(-1, _PIECE_BYTES) as buffer:  # its address is a multiple of a page
            began, done = time.perf_counter(), 0
            while done < _SAMPLE_BYTES and time.perf_counter() - began < _SAMPLE_S:
                count = read_at(file, buffer, first + done)
                done += count
                if count < _PIECE_BYTES:
                    break
            return (done / (time.perf_counter() - began), done) if done else (None, 0)
    finally:
        os.close(file)
