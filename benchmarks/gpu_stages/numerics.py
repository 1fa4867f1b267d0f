"""The tests of the GPU in order of value, several processes beside each other; each result as it comes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_stages.stages import CannotRun, Job

ROOT = Path(__file__).resolve().parents[2]
# What breaks every answer first; tests that are not named here come behind those of their own file
BY_VALUE = (
    "test_bfloat16_graphs_with_kernels_are_close_to_float32",
    "test_float32_graphs_bring_the_ids_of_the_cpu",
    "test_the_kernels_agree_with_attention_written_out",
    "test_a_replay_is_the_step_that_was_captured",
    "test_no_step_waits",
    "test_padding_touches_no_block_of_a_sequence",
)
TINY = ["tests/cpu/test_graph_runner.py", "-k", "garbage or another_size"]  # the same way, without a GPU
MARGIN_S = 4.0  # before the stage is ended: a test that begins later would not end
CORES_PER_PROCESS = 3


def run(job: Job) -> None:
    try:
        import pytest  # noqa: F401 - whether it is there
    except ImportError:
        raise CannotRun("pytest is not installed") from None
    if not job.is_cuda and not job.is_tiny:
        raise CannotRun("the tests of the GPU need one")
    count = 1 if job.is_tiny else max(1, min(4, (os.cpu_count() or 1) // CORES_PER_PROCESS))
    others = [
        subprocess.Popen([sys.executable, __file__, json.dumps(asdict(job)), f"{index}/{count}"])
        for index in range(1, count)
    ]
    run_share(job, 0, count)
    for process in others:
        process.wait()
    outcomes = [json.loads(line).get("outcome") for line in job.records.read_text().splitlines()]
    if failed := outcomes.count("failed"):
        raise RuntimeError(f"{failed} tests failed")
    if "passed" not in outcomes:
        raise RuntimeError("no test ran")


def run_share(job: Job, index: int, count: int) -> None:
    """Run every `count`th test in this process."""
    import pytest

    os.chdir(ROOT)
    tests = TINY if job.is_tiny else ["tests/gpu", "-m", "gpu"]
    pytest.main([*tests, "-q", "-p", "no:cacheprovider"], plugins=[Plugin(job, index, count)])


class Plugin:
    """Orders the tests, records each result, and runs none that would not end in time."""

    def __init__(self, job: Job, index: int, count: int) -> None:
        self._job, self._index, self._count = job, index, count

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=value_of)
        items[:] = items[self._index :: self._count]

    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> bool | None:
        """No test looks for what was left behind: others run beside it."""
        if fixturedef.argname != "nothing_left_behind":
            return None
        fixturedef.cached_result = None, fixturedef.cache_key(request), None
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = "" if report.outcome == "passed" else str(report.longrepr)[-600:]
            self._job.record(test=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=reason)

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        if self._job.left_s > MARGIN_S:
            return None
        self._job.record(test=item.nodeid, outcome="out of time", seconds=0.0, reason="")
        return True


def value_of(item: Any) -> tuple[int, int]:
    """Where a test stands: by its name, and of a product of cases bfloat16 in blocks of 16 first."""
    name = item.name.partition("[")[0]
    place = BY_VALUE.index(name) if name in BY_VALUE else len(BY_VALUE)
    return place, 0 if all(word in item.name for word in ("dtype0", "16")) else 1


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    run_share(Job(**json.loads(sys.argv[1])), *map(int, sys.argv[2].split("/")))
