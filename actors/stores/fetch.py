"""Fetches ranges of a mirror's weights: each byte once a node, several requests at a time, in bounded memory.

The processes of a node fetch at the same time, each what it needs. What another one is fetching is left to it, and
looked for again; where that one ends before it is done, its locks are free, and it is fetched here.
"""

import contextlib
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from actors.stores.disk import ROOM, check_room
from actors.stores.intervals import Interval, merged, num_bytes, pieces, without
from actors.stores.mirror import Mirror, is_weights, read_range
from actors.stores.partial_file import PartialFile
from actors.stores.urls import filesystem_of
from actors.words.errors import CheckpointError

logger = logging.getLogger(__name__)

_PIECE_BYTES = 8 * 1024 * 1024  # of one request
_NUM_AT_ONCE = 8  # requests of one process; it holds so many pieces in memory
_RECORD_S = 1.0  # at most so much work is lost where a process is killed
_SAY_S = 2.0  # how often the log says how far it is
_LOOK_S = 0.05  # how often it looks for what others fetch


class _GivenUp(BaseException):
    """Another request has failed for good: no more tries."""


def fetch(mirror: Mirror, wanted: Mapping[str, Iterable[Interval]]) -> int:
    """Bring ranges of files (by name) to this node → bytes that this process fetched.

    The rest was here, or another process of the node fetched it.
    Raises CheckpointError: for a full disk before anything is fetched, for a store that stays away, for a file that has
    changed; what was fetched until then stays.
    """
    ranges = {name: merged(intervals) for name, intervals in wanted.items()}
    return _Fetch(mirror, ranges).run()


def fetch_all(mirror: Mirror) -> int:
    """Bring all weights to this node → bytes that this process fetched. Raises as `fetch`."""
    return fetch(mirror, {name: [(0, file.size)] for name, file in mirror.files.items() if is_weights(name)})


class _Fetch:
    """One call of `fetch`. All but `_request` and the last sync runs in the thread that called."""

    def __init__(self, mirror: Mirror, ranges: dict[str, list[Interval]]) -> None:
        self._mirror = mirror
        self._ranges = ranges
        self._files: dict[str, PartialFile] = {}
        self._filesystem: Any = None
        self._is_given_up = threading.Event()
        self._running: dict[Future[None], tuple[str, Interval]] = {}
        self._unrecorded: dict[str, list[Interval]] = defaultdict(list)
        self._fetched_bytes = 0

    def run(self) -> int:
        """All of it → bytes fetched."""
        wanted = sum(map(num_bytes, self._ranges.values()))
        try:
            for name in self._ranges:
                self._files[name] = self._mirror.partial(name)
            if lacking := self._lacking():
                check_room(self._mirror.folder, lacking, self._mirror.url)
                self._filesystem = filesystem_of(self._mirror.url)
                self._fetch(lacking)
        except (OSError, ValueError) as error:
            remedy = f"; {ROOM}" if isinstance(error, OSError) else ""
            raise CheckpointError(
                f"{error}{remedy} ({self._lacking() / 1e9:.3f} of {wanted / 1e9:.3f} GB are still missing in "
                f"{self._mirror.folder}; what is there stays)"
            ) from error
        finally:
            self._close()
        return self._fetched_bytes

    def _lacking(self) -> int:
        return sum(num_bytes(self._files[name].missing(self._ranges[name])) for name in self._files)

    def _fetch(self, lacking: int) -> None:
        todo = deque(
            (name, piece)
            for name, file in self._files.items()
            for piece in pieces(file.missing(self._ranges[name]), _PIECE_BYTES)
        )
        began = recorded_at = said_at = time.monotonic()
        with ThreadPoolExecutor(_NUM_AT_ONCE, thread_name_prefix="fetch") as pool:
            try:
                while todo or self._running:
                    self._submit(todo, pool)
                    self._take_results()
                    now = time.monotonic()
                    if now - recorded_at > _RECORD_S or not self._running:
                        recorded_at = now
                        self._record()
                    if now - said_at > _SAY_S:
                        said_at = now
                        self._say(lacking, now - began)
            except BaseException:
                self._is_given_up.set()
                self._save_what_came()
                raise
        self._say(lacking, time.monotonic() - began)

    def _say(self, lacking: int, seconds: float) -> None:
        """Log how far it is: of what was lacking at the start, what others of the node have fetched counts too."""
        left = self._lacking()
        speed = (lacking - left) / max(seconds, 1e-3)
        words = f"about {left / speed:.0f} s left" if speed and left else f"{seconds:.1f} s so far"
        logger.info(
            "fetching %s: %.2f of %.2f GB, %.0f MB/s, %s",
            *(self._mirror.url, (lacking - left) / 1e9, lacking / 1e9, speed / 1e6, words),
        )

    def _submit(self, todo: deque[tuple[str, Interval]], pool: ThreadPoolExecutor) -> None:
        """Start requests for pieces that nobody else fetches; the others go to the end of the queue."""
        for _ in range(len(todo)):
            if len(self._running) >= _NUM_AT_ONCE:  # one piece may have become several requests
                return
            name, piece = todo.popleft()
            file = self._files[name]
            if not file.missing([piece]):
                continue
            if not file.try_lock(piece):
                todo.append((name, piece))
                continue
            lacking = file.missing([piece])  # another process may have fetched a part before it was locked
            for interval in without([piece], lacking):
                file.unlock(interval)
            for interval in lacking:
                self._running[pool.submit(self._request, name, interval)] = name, interval

    def _request(self, name: str, interval: Interval) -> None:
        """In a thread of the pool: fetch a piece into the file."""
        first, end = interval
        if self._is_given_up.is_set():
            raise _GivenUp
        data = read_range(self._mirror, self._filesystem, name, first, end, self._pause)
        self._files[name].write(first, data)

    def _pause(self, seconds: float) -> None:
        if self._is_given_up.wait(seconds):
            raise _GivenUp

    def _take_results(self) -> None:
        """Wait a moment for requests to end. Raises what one of them raised."""
        if not self._running:
            time.sleep(_LOOK_S)
            return
        done, _ = wait(self._running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
        for future in done:
            name, interval = self._running.pop(future)
            future.result()
            self._unrecorded[name].append(interval)

    def _record(self) -> None:
        """Log what has come, file by file, once the store has said that it is still the same file."""
        for name in list(self._unrecorded):
            come = self._unrecorded.pop(name)
            self._mirror.check(self._filesystem, name, self._pause)
            self._files[name].record(come)
            self._fetched_bytes += num_bytes(come)
            for interval in come:
                self._files[name].unlock(interval)

    def _save_what_came(self) -> None:
        """After a failure: log what other requests have fetched, as far as the store answers at once."""
        wait(self._running)
        for future, (name, interval) in self._running.items():
            if not future.cancelled() and future.exception() is None:
                self._unrecorded[name].append(interval)
        with contextlib.suppress(OSError, ValueError, _GivenUp):
            self._record()

    def _close(self) -> None:
        """Note in the background what is on the disk for good, and close the files after that."""

        def sync() -> None:
            for file in self._files.values():
                with contextlib.suppress(OSError):  # then it is fetched again after the machine's next start
                    file.sync()
                file.close()

        if self._fetched_bytes:
            threading.Thread(target=sync, name="fetch-sync", daemon=True).start()
            return
        for file in self._files.values():
            file.close()
