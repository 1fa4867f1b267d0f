"""The key ring: the API keys in force, read again when their file changes, so that keys can be rotated."""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from configs.keys import ApiKey, digest_of, parse_keys

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # at the file; a key that was taken out of it is refused after that


class KeyRing:
    """Finds whose key a client sends. Used in the event loop's thread; the file is read in another one."""

    def __init__(self, source: str, environment: Mapping[str, str] = os.environ) -> None:
        """`source`: `file:PATH` or `env:NAME`. Raises ValueError for keys that cannot be read; it never quotes one."""
        self._source = source
        kind, _, name = source.partition(":")
        self._path = Path(name) if kind == "file" else None
        self._seen = None if self._path is None else _version(self._path)
        self._looked_at = time.monotonic()
        self._lock = asyncio.Lock()
        if self._path is None and not environment.get(name):
            raise ValueError(f"api.keys: {source}: the variable is not set on the replica's node; set it before Ray")
        self._keys = self._parsed(environment[name]) if self._path is None else self._read(self._path)

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """The keys in force."""
        return self._keys

    def find(self, sent: str) -> ApiKey | None:
        """Whose key this is. It is compared with all keys, each in constant time, whichever it is."""
        digest, found = digest_of(sent), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    async def look(self) -> None:
        """Read the file again if it has changed; at most once in LOOK_EVERY_S, and meanwhile all others wait."""
        path = self._path
        if path is None or time.monotonic() < self._looked_at + LOOK_EVERY_S:
            return
        async with self._lock:
            if time.monotonic() >= self._looked_at + LOOK_EVERY_S:
                await asyncio.to_thread(self._look, path)
                self._looked_at = time.monotonic()

    def _look(self, path: Path) -> None:
        version = _version(path)
        if version == self._seen:
            return
        self._seen = version
        try:
            self._keys = self._read(path)
        except ValueError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        logger.info("%s: %d keys in force", self._source, len(self._keys))

    def _read(self, path: Path) -> tuple[ApiKey, ...]:
        try:
            return self._parsed(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"api.keys: {self._source}: cannot be read ({reason})") from None

    def _parsed(self, text: str) -> tuple[ApiKey, ...]:
        try:
            return parse_keys(text)
        except ValueError as error:
            raise ValueError(
                "\n".join(f"api.keys: {self._source}: {line}" for line in str(error).splitlines())
            ) from None


def _version(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced, also behind the links of a mounted secret; None: it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
