"""Parts in an object store, through fsspec: created only if absent, each call tried again while the store fails."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from actors.stores.retries import Pause, Result, patiently
from deployments.batch.store import Chunks

_PROBE = "probe"


class ObjectStore:
    """A Store under a prefix of an fsspec filesystem that can create only if absent (`pipe_file(mode="create")`)."""

    def __init__(self, filesystem: Any, folder: str, pause: Pause = time.sleep) -> None:
        """`folder`: a URL. `pause` waits between tries."""
        self.folder = folder
        self._filesystem = filesystem
        self._pause = pause
        self._check_that_it_creates()

    def create(self, name: str, data: bytes) -> bool:
        """See Store.

        After a failure nobody knows what was written: so it is looked at. What is a beginning of `data` was torn off,
        by a store that shows what is half written, and is written anew.
        """
        path = self._path(name)

        def attempt() -> bool:
            try:
                self._filesystem.pipe_file(path, data, mode="create")
            except (TypeError, NotImplementedError):  # it has no such mode
                raise
            except Exception as error:  # noqa: BLE001 - among others the one that says that it is there
                there = self._look(path)
                if there is None:
                    raise ConnectionError(f"{type(error).__name__}: {error}") from None
                if there != data and data.startswith(there):
                    self._filesystem.rm_file(path)
                    raise ConnectionError(f"only {len(there)} of {len(data)} bytes were written") from None
                return there == data
            return True

        return self._try(f"{name}: creating it", attempt)

    def replace(self, name: str, data: bytes) -> None:
        """See Store."""
        self._try(f"{name}: writing it", lambda: self._filesystem.pipe_file(self._path(name), data))

    def read(self, name: str, num_bytes: int | None = None) -> bytes | None:
        """See Store."""
        return self._try(f"{name}: reading it", lambda: self._look(self._path(name), num_bytes))

    def sizes(self) -> dict[str, int]:
        """See Store."""

        def look() -> dict[str, int]:
            self._filesystem.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                found = self._filesystem.ls(self._plain(self.folder), detail=True)
                return {str(one["name"]).rpartition("/")[2]: int(one["size"] or 0) for one in found}
            return {}

        return self._try("listing it", look)

    def remove(self, name: str) -> None:
        """See Store."""

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.rm_file(self._path(name))

        self._try(f"{name}: removing it", work)

    def exists(self, path: str) -> bool:
        """See Store."""
        return self._try(f"looking for {path}", lambda: self._info(path) is not None)

    def publish(self, path: str, chunks: Chunks) -> None:
        """See Store. It takes the place of what is there: an earlier try of the same job, with the same bytes."""

        def work() -> None:
            size = self._upload(path, chunks)
            there = self._info(path)
            if there is None or there["size"] != size:
                raise ConnectionError(f"only {there['size'] if there else 0} of {size} bytes were written")

        self._try(f"writing {path}", work)

    def sweep(self) -> None:
        """See Store. Uploads that were broken off are the store's own to forget."""

    def _check_that_it_creates(self) -> None:
        """Raises ValueError where "create only if absent" overwrites: then nothing guards a part."""
        self.create(_PROBE, b"1")
        try:
            self._filesystem.pipe_file(self._path(_PROBE), b"2", mode="create")
        except Exception:  # noqa: BLE001 - each store has its own way to say that it is there
            return
        raise ValueError(
            f"{self.folder}: this store overwrites what should be created only if absent, so two drivers could undo "
            "each other's work; write to a local path, and copy the result"
        )

    def _upload(self, path: str, chunks: Chunks) -> int:
        """Write an object → its bytes. An exception leaves what was there: closing alone would commit a beginning."""
        size, file = 0, self._filesystem.open(self._plain(path), "wb", autocommit=False)
        try:
            for chunk in chunks():
                file.write(chunk)
                size += len(chunk)
            file.close()
        except BaseException:
            with contextlib.suppress(Exception):  # what is left of the upload is the store's own to forget
                file.discard()
            with contextlib.suppress(Exception):  # it has nothing to send any more
                file.close()
            raise
        file.commit()
        return size

    def _look(self, path: str, num_bytes: int | None = None) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return bytes(self._filesystem.cat_file(path, start=None if num_bytes is None else 0, end=num_bytes))
        return None

    def _info(self, path: str) -> dict[str, Any] | None:
        self._filesystem.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return dict(self._filesystem.info(self._plain(path)))
        return None

    def _path(self, name: str) -> str:
        return f"{self._plain(self.folder)}/{name}"

    def _plain(self, url: str) -> str:
        return str(self._filesystem._strip_protocol(url))  # noqa: SLF001 - fsspec's own way to read a URL

    def _try(self, what: str, work: Callable[[], Result]) -> Result:
        return patiently(f"{self.folder}: {what}", work, self._pause)
