"""A file of which parts are here: the bytes in a sparse file, and beside it a log of what is there.

Processes of a node share it. A range is locked before it is fetched, by the kernel, which frees the locks of a process
however that ends. A range is in the log only once its bytes are in the file: a process that is killed loses what it
was fetching, and nothing else. The log counts until the machine starts anew; then only what was surely on the disk.
"""

import contextlib
import fcntl
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from actors.stores.intervals import Interval, merged, without

_RECORD = struct.Struct("<QQ")  # an interval; in place of the log's first one is an id of the machine's start
_FLOCK = struct.Struct("hhqqi")  # the kernel's struct flock: kind, whence, start, length, process (none)
_LOG_ITSELF = 2**62  # the byte that stands for the log in locks; no file is so long
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class PartialFile:
    """One file. Each object locks for itself: two of them in one process exclude each other like two processes."""

    def __init__(self, path: Path, size: int) -> None:
        """Open the file, or make one of `size` bytes of which none is here. Raises OSError."""
        self.path = path
        self._durable_path = path.with_name(f".{path.name}.durable")
        self._data = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._log = os.open(path.with_name(f".{path.name}.log"), os.O_RDWR | os.O_CREAT, 0o644)
        self._log_end = _RECORD.size  # what was read of it
        with self._log_locked():
            boot = uuid.UUID(_BOOT_ID.read_text(encoding="ascii").strip()).bytes
            if is_new := os.fstat(self._data).st_size != size:
                os.ftruncate(self._data, size)
                self._durable_path.unlink(missing_ok=True)
            if is_new or os.pread(self._log, _RECORD.size, 0) != boot:
                os.ftruncate(self._log, 0)
                _write_all(self._log, boot, 0)
        self._held = self._durable()

    def close(self) -> None:
        """Give up all locks."""
        os.close(self._data)
        os.close(self._log)

    def missing(self, wanted: Iterable[Interval]) -> list[Interval]:
        """What of these ranges is not here, as far as all processes have logged it."""
        size = os.fstat(self._log).st_size
        if size >= self._log_end + _RECORD.size:
            records = os.pread(self._log, size - self._log_end, self._log_end)
            records = records[: len(records) - len(records) % _RECORD.size]
            self._log_end += len(records)
            self._held = merged([*self._held, *_RECORD.iter_unpack(records)])
        return without(wanted, self._held)

    def try_lock(self, interval: Interval) -> bool:
        """Lock a range, unless another process holds a byte of it."""
        try:
            self._lock(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, interval)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the file system likes
            return False
        return True

    def unlock(self, interval: Interval) -> None:
        """Give a range up."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, interval)

    def write(self, first: int, data: bytes) -> None:
        """Put bytes at a place that is locked; they count once they are recorded. Raises OSError with the path."""
        try:
            _write_all(self._data, data, first)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def record(self, intervals: Iterable[Interval]) -> None:
        """Log that these ranges are here. Raises OSError."""
        with self._log_locked():
            size = os.fstat(self._log).st_size
            records = b"".join(_RECORD.pack(*interval) for interval in intervals)
            _write_all(self._log, records, size - size % _RECORD.size)  # over what a killed process left half written

    def sync(self) -> None:
        """Wait until all that is logged now is on the disk, and note it there: it outlives the machine's end.

        Nobody waits for it. Of two processes that note at the same time one may lose what only the other knows of: that
        is fetched again after the machine's next start.
        """
        self.missing([])
        held = self._held
        os.fdatasync(self._data)
        union = merged([*self._durable(), *held])
        beside = self._durable_path.with_suffix(f".{os.getpid()}")
        with beside.open("wb") as stream:
            stream.write(b"".join(_RECORD.pack(*interval) for interval in union))
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(self._durable_path)

    def _durable(self) -> list[Interval]:
        with contextlib.suppress(FileNotFoundError):
            return list(_RECORD.iter_unpack(self._durable_path.read_bytes()))
        return []

    @contextlib.contextmanager
    def _log_locked(self) -> Iterator[None]:
        whole = _LOG_ITSELF, _LOG_ITSELF + 1
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, whole)
        try:
            yield
        finally:
            self.unlock(whole)

    def _lock(self, how: int, kind: int, interval: Interval) -> None:
        first, end = interval
        fcntl.fcntl(self._log, how, _FLOCK.pack(kind, os.SEEK_SET, first, end - first, 0))


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    """All bytes at a place: near the end of a disk the kernel takes some first, and then says what is wrong."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
