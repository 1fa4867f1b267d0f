"""A batch job's rows on real gangs: a host and a rank are killed, every row is answered once; and Ray Data's way."""

import contextlib
import json
import os
import runpy
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

ray = pytest.importorskip("ray")

from configs.config import Config  # noqa: E402
from configs.files import read_config  # noqa: E402
from deployments.api.bodies import ChatBody  # noqa: E402
from deployments.api.responses import Stamp  # noqa: E402
from deployments.batch.answerer import GangAnswerer  # noqa: E402
from deployments.batch.progress import Progress  # noqa: E402
from deployments.batch.rows import Outcome, Row, Tally  # noqa: E402
from tests.serving import ROOT, free_port, reserved, until  # noqa: E402

pytestmark = pytest.mark.timeout(300)

QUESTIONS = yaml.safe_load((ROOT / "tests/demo/questions.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with gangs of one rank, of which two fit."""
    document = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))
    args = document["applications"][0]["args"]
    del args["parallel"]
    args["placement"] = {"cpus_per_rank": 0.25, "cpus_per_replica": 0.25}
    args["batch"] = {"gangs": 2, "metrics_port": free_port()}
    path = tmp_path_factory.mktemp("config") / "two_gangs.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def rows(count: int) -> Iterator[Row]:
    """The demo's questions, over and over; what it answers was trained."""
    for number in range(count):
        messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]["question"]}]
        body = ChatBody(model="stagemesh-demo", messages=messages, max_tokens=100, temperature=0.0, seed=number)  # type: ignore[arg-type]
        yield Row(number, f"row-{number}", body, Stamp(f"{number:032x}", 0), 200)


def assert_right(outcome: Outcome) -> None:
    assert outcome.status == 200, outcome.body
    choice = json.loads(outcome.body)["choices"][0]
    assert choice["message"]["content"] == QUESTIONS[outcome.number % len(QUESTIONS)]["answer"]


def metrics_of(config: Config) -> str:
    """The page of the first gang that answers."""
    address, port = ray.util.get_node_ip_address(), config.batch.metrics_port
    assert port is not None
    for number in range(2):
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://{address}:{port + number}/metrics", timeout=20).text
    return ""


def processes(name: str) -> list[psutil.Process]:
    """Ray's processes of an actor class, on this machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if f"ray::{name}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_two_gangs_lose_a_host_and_a_rank_and_every_row_is_answered_once(cluster: None, config_file: Path) -> None:
    config: Config = read_config(config_file)
    count, tally, stream = 240, Tally(240), StringIO()
    answerer = GangAnswerer(
        config, datetime(2026, 1, 1, tzinfo=UTC), Progress(tally, stream, "json"), lambda length: min(length, 500)
    )
    seen: set[int] = set()
    killed: list[int] = []
    for outcome in answerer.run(rows(count)):
        assert outcome.number not in seen
        assert_right(outcome)
        seen.add(outcome.number)
        tally.completed += 1
        if len(seen) in (30, 90):
            victims = processes("RankActor" if len(seen) == 30 else "HostActor")
            os.kill(victims[0].pid, signal.SIGKILL)
            killed.append(victims[0].pid)
        if len(seen) == 30:
            labels = 'model_name="stagemesh-demo",replica="gang 0"'
            assert f"stagemesh_generation_tokens_total{{{labels}}}" in metrics_of(config)
    assert seen == set(range(count)) and len(killed) == 2
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert (last["done"], last["failed"]) == (count, 0)
    assert last["generated_tokens"] > 10 * count
    until(lambda: not reserved(), within_s=20)
    until(lambda: not processes("HostActor") and not processes("RankActor"), within_s=20)


def test_a_dataset_of_ray_data(cluster: None, config_file: Path) -> None:
    example: dict[str, Any] = runpy.run_path(str(ROOT / "examples/dataset.py"))
    asked = [entry["question"] for entry in QUESTIONS[:5]]
    found = example["main"](str(config_file), [*asked, "x" * 10_000])
    by_question = {row["question"]: row for row in found}
    assert [by_question[question]["answer"] for question in asked] == [entry["answer"] for entry in QUESTIONS[:5]]
    refused = by_question["x" * 10_000]
    assert refused["answer"] is None and "maximum context length is 512 tokens" in refused["error"]
    until(lambda: not reserved(), within_s=20)
