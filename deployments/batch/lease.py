"""The lease: one driver works on an output at a time; one that has lost it writes nothing more."""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import msgspec

from deployments.batch.store import Store

BEAT_S = 5.0  # between two signs of life
EXPIRES_S = 30.0  # of silence; only on another machine, where nobody can look whether the process lives


class Holder(msgspec.Struct, frozen=True):
    """The driver that holds a lease."""

    host: str
    machine: str  # boot and process namespace: within one, process ids mean the same
    pid: int
    started: str  # of the process, in the kernel's ticks: ids come again
    since: str
    nonce: str  # no two leases have the same bytes

    @classmethod
    def here(cls) -> "Holder":
        """The process that asks."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        pid = os.getpid()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), machine, pid, _started(pid) or "", now, uuid.uuid4().hex)


class Lease:
    """Held from `with` to its end. Leases are numbered; the highest number holds."""

    def __init__(self, store: Store, pause: Callable[[float], None] = time.sleep) -> None:
        self._store, self._pause = store, pause
        self._holder = Holder.here()
        self._number = 0
        self._num_beats = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="batch-lease", daemon=True)

    @property
    def number(self) -> int:
        """No other driver of this output has, or had, this number."""
        return self._number

    def check(self) -> None:
        """Raises ValueError when another driver has taken over: this one must write nothing more."""
        successor = self._read(self._number + 1)
        if successor is not None:
            raise ValueError(
                f"{self._store.folder}: {_named(successor)} has taken this job over, because nothing was heard of this "
                "driver for long; this one stops"
            )

    def __enter__(self) -> Self:
        """Take the lease. Raises ValueError, naming the driver that works on this output."""
        while True:
            numbers = [int(name[6:11]) for name in self._store.sizes() if name.startswith("lease-")]
            highest = max(numbers, default=0)
            holder = self._read(highest) if highest else None
            if holder is not None and self._is_alive(holder, highest):
                raise ValueError(
                    f"{self._store.folder}: {_named(holder)} works on this output; wait until it has ended, stop it, "
                    "or name another --output"
                )
            self._number = highest + 1
            if self._store.create(_lease_name(self._number), msgspec.json.encode(self._holder)):
                self._thread.start()
                return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(ValueError, OSError):  # then the lease ends by its silence
            self._store.replace(_beat_name(self._number), _ENDED)

    def _beat_on(self) -> None:
        while not self._end.wait(BEAT_S if self._num_beats else 0.0):
            self._num_beats += 1
            with contextlib.suppress(ValueError, OSError):  # the driver's own writes say so; while it works, it beats
                self._store.replace(_beat_name(self._number), str(self._num_beats).encode())

    def _is_alive(self, holder: Holder, number: int) -> bool:
        """Whether the driver lives: by its process where that can be seen, else by whether its signs go on."""
        beat = self._store.read(_beat_name(number))
        if beat == _ENDED:
            return False
        if holder.machine == self._holder.machine:
            return _started(holder.pid) == holder.started
        for _ in range(int(EXPIRES_S)):
            self._pause(1.0)
            latest = self._store.read(_beat_name(number))
            if latest != beat:
                return latest != _ENDED
        return False

    def _read(self, number: int) -> Holder | None:
        data = self._store.read(_lease_name(number))
        return None if data is None else msgspec.json.decode(data, type=Holder)


_ENDED = b"ended"


def _lease_name(number: int) -> str:
    return f"lease-{number:05d}"


def _beat_name(number: int) -> str:
    return f"beat-{number:05d}"


def _named(holder: Holder) -> str:
    return f"the process {holder.pid} on {holder.host}, since {holder.since},"


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
