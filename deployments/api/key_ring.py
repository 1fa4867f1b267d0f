"""The key ring: the API keys in force, read again when their file changes, so that keys can be rotated."""

import asyncio
import hmac
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from configs.keys import ApiKey, digest_of, parse_keys

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # at the file; a key that was taken out of it is refused after that
WAIT_S = 1.0  # for a look; a file system that hangs holds requests up no longer


class KeyRing:
    """Finds whose key a client sends. Used in the event loop's thread; the file is read in another one."""

    def __init__(self, source: str, environment: Mapping[str, str] = os.environ) -> None:
        """`source`: `file:PATH` or `env:NAME`. Raises ValueError for keys that cannot be read; it never quotes one."""
        self._source = source
        kind, _, name = source.partition(":")
        self._path = Path(name) if kind == "file" else None
        self._seen = None if self._path is None else _version(self._path)
        self._looked_at = time.monotonic()
        self._looking: Future[None] | None = None  # the look that goes on, or the last one
        self._complaint = ""  # what was last said of the file; it is said once
        if self._path is None and not environment.get(name):
            raise ValueError(f"api.keys: {source}: the variable is not set on the replica's node; set it before Ray")
        self._keys = self._parsed(environment[name]) if self._path is None else self._parsed(self._text(self._path))

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
        """Read the file again if it has changed; at most once in LOOK_EVERY_S, for all who ask meanwhile.

        What takes longer than WAIT_S goes on in its thread, and the keys stay as they were until it ends.
        """
        path, now = self._path, time.monotonic()
        if path is None:
            return
        looking = self._looking
        if (looking is None or looking.done()) and now >= self._looked_at + LOOK_EVERY_S:
            self._looked_at, looking = now, Future()
            self._looking = looking
            threading.Thread(target=self._look_aside, args=(path, looking), name="key ring", daemon=True).start()
        if looking is None or looking.done():
            return
        left_s = self._looked_at + WAIT_S - now
        if left_s > 0:
            await asyncio.wait({asyncio.wrap_future(looking)}, timeout=left_s)
        if not looking.done():
            self._complain(f"{self._source}: is not read within {WAIT_S:g} s; the file system may hang")

    def _look_aside(self, path: Path, looking: Future[None]) -> None:
        try:
            self._look(path)
        except Exception:
            logger.exception("the keys stay as they were")
        finally:
            looking.set_result(None)

    def _look(self, path: Path) -> None:
        version = _version(path)
        if version == self._seen:
            return
        try:
            text = self._text(path)
        except ValueError as error:  # it may be read the next time, and needs no new version for that
            self._complain(str(error))
            return
        self._seen = version
        try:
            self._keys = self._parsed(text)
        except ValueError as error:
            self._complain(str(error))
            return
        self._complaint = ""
        logger.info("%s: %d keys in force", self._source, len(self._keys))

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.error("the keys stay as they were: %s", complaint)

    def _text(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
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
