"""Where a job keeps its parts: files that are created whole or not at all, and never rewritten."""

import contextlib
import filecmp
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

_TEMPORARY = ".tmp-"  # of files that are being written; a driver that was killed may leave some

Chunks = Callable[[], Iterable[bytes]]  # what a file holds, from its beginning at each call


class Store(Protocol):
    """The folder of a job's parts, `OUT.parts`, and beside it the files that the job ends with.

    Names are plain file names of that folder. Raises ValueError, with the remedy, when the store fails for long.
    """

    folder: str

    def create(self, name: str, data: bytes) -> bool:
        """Create a file with these bytes, all of them or none. False: one is there that holds others."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a file, whatever was there. For signs of life only: parts are created."""

    def read(self, name: str, num_bytes: int | None = None) -> bytes | None:
        """What a file holds, or the beginning of it. None: there is no such file."""

    def sizes(self) -> dict[str, int]:
        """The files that are there, with their bytes."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def exists(self, path: str) -> bool:
        """Whether a file is there that the job ends with."""

    def publish(self, path: str, chunks: Chunks) -> None:
        """Create a file that the job ends with, whole or not at all. Raises ValueError where another one is there."""

    def sweep(self) -> None:
        """Remove what killed drivers left half written. Only for who holds the lease."""


class LocalStore:
    """A Store in a folder of this machine, or of one that nodes share. See Store."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._path = Path(folder)
        self._prefix = f"{_TEMPORARY}{uuid.uuid4().hex}-"
        if self._path.exists() and not self._path.is_dir():
            raise ValueError(
                f"{folder}: is no folder, but a job keeps its parts there; move it, or name another --output"
            )

    def create(self, name: str, data: bytes) -> bool:
        """See Store."""
        with self._written([data]) as temporary:
            if self._link(temporary, self._path / name):
                return True
        return (self._path / name).read_bytes() == data

    def replace(self, name: str, data: bytes) -> None:
        """See Store."""
        with self._written([data]) as temporary:
            temporary.replace(self._path / name)

    def read(self, name: str, num_bytes: int | None = None) -> bytes | None:
        """See Store."""
        try:
            with (self._path / name).open("rb") as file:
                return file.read(-1 if num_bytes is None else num_bytes)
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """See Store."""
        paths = self._path.iterdir() if self._path.is_dir() else ()
        return {path.name: path.stat().st_size for path in paths if not path.name.startswith(_TEMPORARY)}

    def remove(self, name: str) -> None:
        """See Store."""
        (self._path / name).unlink(missing_ok=True)

    def exists(self, path: str) -> bool:
        """See Store."""
        return Path(path).exists()

    def publish(self, path: str, chunks: Chunks) -> None:
        """See Store."""
        with self._written(chunks()) as temporary:
            if not self._link(temporary, Path(path)) and not filecmp.cmp(temporary, path, shallow=False):
                raise ValueError(f"{path}: is there, and is not what this job writes; move it and start again")

    def sweep(self) -> None:
        """See Store."""
        for path in self._path.glob(f"{_TEMPORARY}*"):
            if not path.name.startswith(self._prefix):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written(self, chunks: Iterable[bytes]) -> Iterator[Path]:
        """A temporary file with these bytes, on the disk for good; it is gone afterwards."""
        if not self._path.is_dir():
            self._path.mkdir(exist_ok=True)
            _sync_folder(self._path.parent)
        temporary = self._path / f"{self._prefix}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _link(self, temporary: Path, path: Path) -> bool:
        """Give a whole file its name; False where the name is taken."""
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be created ({error}); the folder must be on a file system with hard links, "
                "as local disks and NFS have them"
            ) from None
        _sync_folder(path.parent)
        return True


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
