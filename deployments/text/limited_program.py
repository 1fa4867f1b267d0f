"""The program of a limited process: loads a worker, limits itself, and answers line after line.

Each line on standard input is one JSON request, each line on standard output its answer, and the kernel ends the
process at the first request that takes more processor time than allowed. It also ends with its parent. See
limited_process.py.
It imports nothing of the product, because it is run as a file, wherever the product is.
"""

import importlib.util
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

NO_MEMORY = 3  # exit status, where a request needs more memory than allowed


def limit_memory(more_bytes: int) -> None:
    """Limit the address space to what is mapped now and `more_bytes`; allocations beyond that raise MemoryError."""
    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more_bytes, mapped + more_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a worker that ends over a request leaves no file


def load(path: str) -> Any:
    """The worker's module, from its file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answer line after line until standard input ends."""
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    os.nice(setup["nice"])
    answer_of = load(setup["worker"]).prepare(setup["setup"])
    limit_memory(setup["memory_bytes"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])  # its signal ends the process, whatever it is doing
        try:
            answer = json.dumps(answer_of(json.loads(line)))
        except MemoryError:
            os._exit(NO_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
