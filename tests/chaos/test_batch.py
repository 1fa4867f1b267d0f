"""Batch jobs whose driver, host and ranks are killed: started again, they end in the bytes of an undisturbed run."""

import json
import random
import re

import pytest

ray = pytest.importorskip("ray")

from tests.chaos.batch_runs import BROKEN, Bench, kill, pause, processes  # noqa: E402
from tests.chaos.serving import cluster  # noqa: E402
from tests.serving import until  # noqa: E402

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def address():
    with cluster():
        yield ray.get_runtime_context().gcs_address


def test_a_rank_and_the_driver_are_killed(tmp_path, address):
    bench = Bench(tmp_path, address)
    bench.write(100, (1, 1), scheduler={"max_num_seqs": 6})
    bench.finish(bench.start("plain.jsonl"))

    driver = bench.start("out.jsonl")
    assert bench.wait_for_more("out.jsonl", driver)
    kill(processes("RankActor")[0])
    assert bench.wait_for_more("out.jsonl", driver)
    kill(driver)
    summary = bench.finish(bench.start("out.jsonl"))
    assert 0 < summary["skipped"] < summary["rows"] == 100 and summary["failed"] == 2
    assert bench.files("out.jsonl") == bench.files("plain.jsonl")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_twenty_times(tmp_path, address, tell):
    rng = random.Random(5)
    bench = Bench(tmp_path, address)
    bench.write(2000)
    plain = bench.finish(bench.start("plain.jsonl"))
    tell(f"undisturbed: {plain}")

    driver, killed = bench.start("out.jsonl"), []
    for at in sorted(rng.randrange(1900) for _ in range(20)):  # rows that are kept by then
        victim = rng.choice(["driver", "RankActor", "HostActor"])
        until(lambda at=at, driver=driver: bench.num_kept("out.jsonl") >= at or driver.poll() is not None, 900, 0.5)
        pause(rng, 2.0)
        there = processes(victim)
        if victim == "driver" or not there:
            kill(driver)
            until(lambda: not processes("RankActor"))
            driver = bench.start("out.jsonl")
        else:
            kill(rng.choice(there))
        killed.append(victim if there else "driver")
        tell(f"killed: {killed[-1]} ({len(killed)}); {bench.num_kept('out.jsonl')} rows are kept")
        if driver.poll() is not None:  # a gang that ended too often in a row: a person starts the command again
            tell((tmp_path / "log").read_text()[-500:])
            driver = bench.start("out.jsonl")
    summary = bench.finish(driver)
    tell(f"disturbed: {summary}")
    answers, errors = bench.files("out.jsonl")
    assert (answers, errors) == bench.files("plain.jsonl")
    said = [json.loads(line)["response"]["body"]["error"] for line in errors.splitlines()]
    assert len(said) == 40 and len({re.sub(r"\d", "", one["message"]) for one in said}) == BROKEN
    assert all(";" in one["message"] or "must" in one["message"] or "JSON" in one["message"] for one in said)
