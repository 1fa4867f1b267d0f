"""Paths and URLs of a job: which of them are local, how they are opened, and what a path must not be."""

import io
import os
import time
from pathlib import Path
from typing import Any

from actors.stores.retries import Pause, patiently
from actors.stores.urls import filesystem_of, is_url
from deployments.batch.object_store import ObjectStore
from deployments.batch.store import LocalStore, Store


def normalized(place: str, option: str) -> str:
    """A URL as it is, a path absolute. Raises ValueError for a relative path in a Ray job, which would be lost."""
    if is_url(place):
        return place
    path = Path(place.removeprefix("file://"))
    if option != "--input" and not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ValueError(
            f"{option}: {place} is relative, but this is a Ray job, whose working directory Ray makes for it and "
            "removes; give an absolute path that outlives the job, or a URL"
        )
    return str(path.absolute())


def default_errors(output: str) -> str:
    """Where the error rows go when nobody says: answers.jsonl → answers.errors.jsonl."""
    folder, slash, name = output.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return f"{folder}{slash}{stem}.errors.{suffix}" if dot and stem else f"{output}.errors"


def open_store(output: str, errors: str) -> Store:
    """The Store of the job that ends with these two files. Raises ValueError."""
    if output == errors:
        raise ValueError(f"--errors: is the same file as --output, {output}; name another")
    if output.partition("://")[0] != errors.partition("://")[0] and (is_url(output) or is_url(errors)):
        raise ValueError("--errors: must be in the same store as --output; leave it out to have it beside that")
    folder = f"{output}.parts"
    if is_url(output):
        return ObjectStore(filesystem_of(output), folder)
    for option, path in (("--output", output), ("--errors", errors)):
        if Path(path).is_dir():
            raise ValueError(f"{option}: {path} is a folder; name a file")
        if not Path(path).parent.is_dir():
            raise ValueError(f"{option}: {Path(path).parent} is no folder; make it first")
    if Path(output).parent.stat().st_dev != Path(errors).parent.stat().st_dev:  # both are linked to at the end
        raise ValueError("--errors: must be on the same file system as --output; leave it out to have it beside that")
    return LocalStore(folder)


class InputFile(io.RawIOBase):
    """The bytes of a file or an object, read in ranges; each is tried again while the store fails."""

    def __init__(self, place: str, filesystem: Any = None, pause: Pause = time.sleep) -> None:
        """`filesystem`: that of a URL. Raises ValueError when it is not there, or is no file."""
        self._place, self._filesystem, self._pause = place, filesystem, pause
        self._at = 0
        self._file: io.BufferedReader | None = None
        if filesystem is None:
            if not Path(place).is_file():
                raise ValueError(f"--input: {place} is no file; name a JSONL or Parquet file")
            self._file = Path(place).open("rb")  # noqa: SIM115 - closed with this one
            self.size = os.fstat(self._file.fileno()).st_size
        else:
            self.size = int(self._try(lambda: filesystem.info(place))["size"])

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io."""
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence] + offset
        return self._at

    def tell(self) -> int:
        """See io."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """See io."""
        view = memoryview(buffer).cast("B")
        data = self._range(self._at, min(self._at + len(view), self.size))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """See io."""
        if self._file is not None:
            self._file.close()
        super().close()

    def _range(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        if self._file is not None:
            self._file.seek(start)
            return self._file.read(end - start)

        def fetch() -> bytes:
            data = bytes(self._filesystem.cat_file(self._place, start=start, end=end))
            if len(data) != end - start:
                raise ConnectionError(f"{len(data)} bytes came, of {end - start}")
            return data

        return bytes(self._try(fetch))

    def _try(self, work: Any) -> Any:
        return patiently(f"--input: reading {self._place}", work, self._pause)


def open_input(place: str) -> io.BufferedReader:
    """A file or object, buffered. Raises ValueError."""
    filesystem = filesystem_of(place) if is_url(place) else None
    return io.BufferedReader(InputFile(place, filesystem), buffer_size=(4 << 20) if is_url(place) else (256 << 10))
