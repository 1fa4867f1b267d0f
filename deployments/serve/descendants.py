"""Keeps track of every process that this one starts, also indirectly, so that it can end them all (Linux)."""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>; see prctl(2)


def adopt_orphans() -> None:
    """From now on a descendant whose parent dies becomes our child, instead of init's. Does nothing except on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """The process ids of our direct children, including those that have ended and were not waited for."""
    pids: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread ended between the listing and the reading
            pids += [int(pid) for pid in task.read_text().split()]
    return pids


def end_children(patience_s: float) -> None:
    """Wait up to `patience_s` for all children to end, then kill them, and their children as they become ours."""
    deadline = time.monotonic() + patience_s
    while pids := children():
        for pid in pids:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
