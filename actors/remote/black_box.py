"""A file in which a rank's process leaves the step that it was in, and how it ended, where it cannot report that.

A kill from outside leaves the step only. A signal that a process causes itself (a bad address, an abort) also leaves
the stacks of its threads, without values; `os._exit` leaves its status. The process that takes the rank over reads the
file: it runs on the same node.
"""

import contextlib
import faulthandler
import mmap
import os
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from actors.decisions.failure.culprit import CrashReport

_STEP_BYTES = 8


@dataclass(frozen=True)
class CrashFile:
    """Where the black box of a process is, and which process that is."""

    pid: int
    started: int  # clock ticks since boot: the pid alone may be another process's by now
    path: str


class BlackBox:
    """The black box of this process; it is open as long as the process lives."""

    def __init__(self) -> None:
        path = log_folder() / f"stagemesh-{os.getpid()}-{_started(os.getpid())}.box"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, _STEP_BYTES)
        os.lseek(self._fd, _STEP_BYTES, os.SEEK_SET)
        self._mapping = mmap.mmap(self._fd, _STEP_BYTES)
        self._step = memoryview(self._mapping).cast("q")
        self._step[0] = -1
        self.crash_file = CrashFile(os.getpid(), _started(os.getpid()), str(path))
        faulthandler.enable(self._fd, all_threads=True)
        self._note_exits()

    def enter(self, step: int) -> None:
        """Note the step that begins; -1: it has ended."""
        self._step[0] = step

    def _note_exits(self) -> None:
        """Wrap `os._exit`, after which nothing else runs. Forked children inherit it and note nothing."""
        leave, fd, pid = os._exit, self._fd, os.getpid()

        def note_and_leave(status: int) -> NoReturn:
            if os.getpid() == pid:
                os.write(fd, b"os._exit(%d)\n" % status)
            leave(status)

        os._exit = note_and_leave


def collect_crash_report(crash_file: CrashFile) -> CrashReport | None:
    """Make sure that a process of this node is gone, and take what it left; None when there is no file on this node."""
    with contextlib.suppress(OSError):
        if _started(crash_file.pid) == crash_file.started:
            os.kill(crash_file.pid, signal.SIGKILL)
    path = Path(crash_file.path)
    try:
        content = path.read_bytes()
        path.unlink()
    except OSError:
        return None
    step = int.from_bytes(content[:_STEP_BYTES], "little", signed=True)
    return CrashReport(step, content[_STEP_BYTES:].decode(errors="replace"))


def log_folder() -> Path:
    """The folder of this process's log where that is a file, as under Ray; else the one for temporary files."""
    log = Path("/proc/self/fd/2").resolve()
    return log.parent if log.is_file() else Path(tempfile.gettempdir())


def _started(pid: int) -> int:
    """When a process began, in clock ticks since boot (proc_pid_stat(5), field 22). Raises OSError."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])
