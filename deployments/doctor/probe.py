"""The process that reads one node: each section in a thread of its own, so that what hangs hides nothing else.

python -m deployments.doctor.probe SECONDS < ASKED      # a line of JSON a section, as soon as it is read
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from configs.files import PROJECT_ROOT
from deployments.doctor import host, storage
from deployments.doctor.bucket import read_bucket
from deployments.doctor.facts import SECTIONS, Asked, Written
from deployments.doctor.hub import read_hub

_START_S = 30.0  # for the process to begin and to end, on top of what its sections get


def run_probe(asked: Asked, within_s: float) -> bytes:
    """Read this node in a process of its own → the lines that it has written within that time."""
    command = [sys.executable, "-m", "deployments.doctor.probe", str(within_s)]
    given = msgspec.json.encode(asked)
    try:
        done = subprocess.run(
            command,
            input=given,
            cwd=PROJECT_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=within_s + _START_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return late.stdout or b""
    return done.stdout


def _readers(asked: Asked) -> dict[str, Callable[[], Any]]:
    from cluster.placement.nvml import read_gpus

    return {
        "versions": host.read_versions,
        "limits": host.read_limits,
        "shm": host.read_shared_memory,
        "checkpoint": lambda: storage.refusal(asked),
        "disk": lambda: storage.read_disk(asked),
        "network": host.read_network,
        "environment": host.read_environment,
        "hub": lambda: read_hub(asked),
        "bucket": lambda: read_bucket(asked),
        "gpus": read_gpus,
        "cuda": host.read_cuda,
        "http_port": lambda: host.is_port_free(asked.http_port),
    }


def main() -> None:
    """Read all sections, and end when they are read or the time is over."""
    readers = _readers(msgspec.json.decode(sys.stdin.buffer.read(), type=Asked))
    assert readers.keys() == SECTIONS.keys()
    deadline = time.monotonic() + float(sys.argv[1])  # the imports are behind us
    lock = threading.Lock()

    def read(section: str) -> None:
        try:
            written = Written(section, facts=readers[section]())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sections are read, and it is said
            written = Written(section, error=f"{type(error).__name__}: {error}")
        with lock:
            sys.stdout.buffer.write(msgspec.json.encode(written) + b"\n")
            sys.stdout.buffer.flush()

    threads = [threading.Thread(target=read, args=(section,), daemon=True) for section in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    with lock:
        os._exit(0)  # a thread that hangs does not hold it up


if __name__ == "__main__":
    main()
