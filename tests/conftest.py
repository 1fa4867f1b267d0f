"""What all tests share: one thread a process, Ray without surprises, and a look for what was left behind."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before torch or Ray is imported, and for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ADDRESS", "local")  # never a cluster that happens to run on this machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if str(ROOT) not in sys.path:  # a checkout that was not installed
    sys.path.insert(0, str(ROOT))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cores", choices=("one", "all"), help="only tests that take one core, or only the others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test` runs those that take one core two at a time, and then the others one by one."""
    cores = config.getoption("--cores")
    if cores is not None:
        left_out = [item for item in items if _takes_all_cores(item) != (cores == "all")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _takes_all_cores(item) == (cores == "all")]


def _takes_all_cores(item: pytest.Item) -> bool:
    """Whether it starts ranks or servers, with promises about time: Ray, the pool of ranks, or as its file says."""
    on_ray = {"local_ray", "chaos"} & set(item.path.relative_to(ROOT).parts)
    return bool(on_ray or "pool" in getattr(item, "fixturenames", ()) or item.get_closest_marker("all_cores"))


def _segments() -> set[Path]:
    folder = Path("/dev/shm")
    return set(folder.iterdir()) if folder.is_dir() else set()


def _is_mapped(segment: Path) -> bool:
    """Whether a living process still uses it: then it is not left behind, or not by us."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(segment) in maps.read_text():
                return True
    return False


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        helper = {"multiprocessing.forkserver", "multiprocessing.resource_tracker"}  # these end with their parent
        command = " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and not any(name in command for name in helper)
    return False


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """At the end of the session no process that a test started runs, and /dev/shm holds no segment of one."""
    before = _segments()
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    deadline = time.monotonic() + 10.0
    while True:
        processes = [process for process in psutil.Process().children(recursive=True) if _is_running(process)]
        segments = [segment for segment in _segments() - before if not _is_mapped(segment)]
        if not (processes or segments) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert not processes, f"left running: {processes}"
    assert not segments, f"left in shared memory: {segments}"
