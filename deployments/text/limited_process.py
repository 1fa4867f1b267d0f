"""A process that works for this one under limits of time and memory, and can be killed: a line in, a line out."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from deployments.text import limited_program

# by the kernel after its processor time · by itself where there is no more memory · the same, in Python
_LIMITS = (-signal.SIGPROF, -signal.SIGABRT, limited_program.NO_MEMORY)
_END_S = 10.0  # how long a process that has closed its socket may take to end


class LimitedProcess:
    """Used by one thread at a time. It starts with the first request, and anew after one that ended it."""

    def __init__(
        self, worker: str, setup: dict[str, Any], *, cpu_s: float, memory_bytes: int, wall_s: float, nice: int = 0
    ) -> None:
        """`worker`: the file beside this one whose `prepare(setup)` gives the function from request to answer.

        `cpu_s`: processor time for one request. `memory_bytes`: beside what it has when it starts. `wall_s`: how long
        an answer is waited for, because it may get no processor, or be stopped. `nice`: how far it stands back.
        """
        self._setup = {
            "worker": str(Path(__file__).with_name(worker)),
            "setup": setup,
            "cpu_s": cpu_s,
            "memory_bytes": memory_bytes,
            "nice": nice,
        }
        self._wall_s = wall_s
        self.reached_limit = False  # the last request ended the process by its own time or memory: so it will again
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs; None where there is none."""
        return None if self._process is None else self._process.pid

    def ask(self, request: object) -> dict[str, Any] | None:
        """What it answers; None when it ended over the request, or had to be killed."""
        self.reached_limit = False
        try:
            connection = self._socket or self._start()
            connection.sendall(_line(request))
            received = bytearray()
            while not received.endswith(b"\n"):
                part = connection.recv(1 << 20)
                if not part:
                    raise ConnectionError("the process has ended")
                received += part
            answer: dict[str, Any] = json.loads(received)
            return answer
        except OSError as error:
            if self._process is not None and not isinstance(error, TimeoutError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.reached_limit = self._process.wait(_END_S) in _LIMITS
            self.close()
            return None

    def close(self) -> None:
        """End the process. May be called twice; a later request starts another."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        # -P: nothing is imported from the program's own folder, whose files could hide others
        self._process = subprocess.Popen(
            [sys.executable, "-P", limited_program.__file__], stdin=theirs.fileno(), stdout=theirs.fileno()
        )
        theirs.close()
        ours.settimeout(self._wall_s)
        self._socket = ours
        ours.sendall(_line(self._setup))
        return ours


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
