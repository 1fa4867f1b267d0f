"""Stores that fail: a bucket with the semantics of an object store and faults of all kinds, and a store that dies."""

import io
import random
import threading
from collections.abc import Callable
from typing import Any

from fsspec.spec import AbstractFileSystem

FAULTS = ("timeout before", "timeout after", "503", "torn")


class Bucket(AbstractFileSystem):
    """Objects in memory: no rename, no append; what is written is there at once, or when it is torn a beginning."""

    protocol = "bucket"
    cachable = False

    def __init__(self, fault: Callable[[str, str], str | None] = lambda call, path: None, creates: bool = True) -> None:
        """`fault`: which of FAULTS a call meets, if any. `creates`: whether it can create only if absent."""
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.fault, self.creates = fault, creates
        self.calls: list[tuple[str, str]] = []

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._strip_protocol(path)
        fault = self._meet("put", path)
        if mode == "create" and self.creates and path in self.objects:
            raise OSError("412 Precondition Failed")
        if fault == "torn":
            self.objects[path] = bytes(value[: len(value) // 2])
            raise ConnectionError("connection lost while sending")
        self.objects[path] = bytes(value)
        if fault == "timeout after":
            raise TimeoutError("no answer")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        self._meet("get", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        prefix = self._strip_protocol(path).rstrip("/") + "/"
        self._meet("list", prefix)
        found = [self._info(name) for name in sorted(self.objects) if name.startswith(prefix)]
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [one["name"] for one in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self._meet("head", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self._info(path)

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        self._meet("delete", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        del self.objects[path]

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a bucket cannot rename")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        assert mode == "wb"
        return _Upload(self, path, kwargs.get("autocommit", True))

    def _info(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    def _meet(self, call: str, path: str) -> str | None:
        self.calls.append((call, path))
        fault = self.fault(call, path)
        if fault == "503":
            raise OSError("503 Slow Down")
        if fault == "timeout before" or (fault and call != "put"):
            raise TimeoutError("no answer")
        return fault


class _Upload(io.BytesIO):
    """A multipart upload, as fsspec has them: closing completes it, after an exception too, unless autocommit=False."""

    def __init__(self, bucket: Bucket, path: str, autocommit: bool) -> None:
        super().__init__()
        self._bucket, self._path, self._autocommit = bucket, path, autocommit
        self._data = b""

    def close(self) -> None:
        if not self.closed:
            self._data = self.getvalue()
            super().close()
            if self._autocommit:
                self.commit()

    def commit(self) -> None:
        self._bucket.pipe_file(self._path, self._data)

    def discard(self) -> None:
        self._data = b""


def now_and_then(seed: int, share: float) -> Callable[[str, str], str | None]:
    """Faults of all kinds, in this share of the calls."""
    rng = random.Random(seed)
    return lambda call, path: rng.choice(FAULTS) if rng.random() < share else None


class Killed(BaseException):
    """The driver is killed here."""


class DyingStore:
    """A Store whose driver is killed after the call with a number; those of the lease's thread do not count."""

    def __init__(self, store: Any, at: int = 0) -> None:
        """`at`: 0: it is not killed."""
        self._store, self._at = store, at
        self.num_calls = 0
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and name == "replace":
                return None
            if self.is_dead:
                raise Killed
            self.num_calls += 1
            number = self.num_calls  # calls may come within this one
            result = found(*args)
            if number == self._at:
                self.is_dead = True
                raise Killed
            return result

        return call
