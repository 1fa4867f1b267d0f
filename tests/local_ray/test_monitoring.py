"""Two replicas behind one proxy, as Prometheus sees them: nothing is mixed up, and every panel has an answer.

`apt-get install prometheus` first; without it the soaks are skipped.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.prometheus import Prometheus, filled, not_there, panels
from tests.serving import ROOT, Run, until

pytest.importorskip("ray")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

KEY = "sk-abcdefghijklmnopqrst"
HEADERS = {"authorization": f"Bearer {KEY}"}
BODY = {"model": "stagemesh-demo", "prompt": "A stage", "temperature": 0, "ignore_eos": True}
STAGES = 2


def config(folder: Path, num_replicas: int) -> Path:
    """The demo with so many replicas, each of two stages."""
    document = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    document["applications"][0]["deployments"] = [{"name": "LLMReplica", "num_replicas": num_replicas}]
    placement = {"cpus_per_rank": 0.2, "cpus_per_replica": 0.2}
    document["applications"][0]["args"]["placement"] = placement
    document["applications"][0]["args"]["parallel"] = {"tensor_parallel_size": 1, "pipeline_parallel_size": STAGES}
    path = folder / "replicas.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["proxy", "haproxy"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "keys.yaml").write_text(f"alice: {KEY}\n")
    changes: dict[str, Any] = {
        "api": {"keys": f"file:{folder / 'keys.yaml'}"},
        "monitoring": {"metric_aliases": "vllm"},
        "recovery": {"warm_spares": 1},
    }
    with Run(folder, str(config(folder, 2)), ha_proxy=request.param, **changes) as run:
        run.wait_for()
        yield run


def ask(run: Run, count: int, max_tokens: int = 16) -> list[int]:
    """So many requests, eight at once → their statuses."""

    def one(_: int) -> int:
        body = {**BODY, "max_tokens": max_tokens}
        return httpx.post(f"{run.url}/v1/completions", json=body, headers=HEADERS, timeout=120).status_code

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(one, range(count)))


def total(prometheus: Prometheus, expression: str) -> float:
    return sum(float(series["value"][1]) for series in prometheus.query(expression))


def test_one_target_gives_all_replicas_and_every_panel_has_an_answer(run: Run, tmp_path: Path) -> None:
    assert ask(run, 40) == [200] * 40
    page = run.get("/metrics").text
    assert not_there([target["expr"] for panel in panels() for target in panel["targets"]], page) == []
    assert page.count("stagemesh_build_info{") == 2
    with Prometheus(tmp_path, {"stagemesh": [f"{run.url}/metrics"]}) as prometheus:
        until(lambda: total(prometheus, "sum(stagemesh_generation_tokens_total)") == 40 * 16, within_s=20)
        by_replica = prometheus.query("sum by (replica) (stagemesh_generation_tokens_total)")
        assert len(by_replica) == 2 and all(float(series["value"][1]) for series in by_replica)
        assert total(prometheus, "sum(vllm:generation_tokens_total)") == 40 * 16
        cluster = httpx.get(f"{run.url}/cluster", headers=HEADERS, timeout=20).json()
        victim = cluster["ranks"][1]["pid"]  # a rank, and no spare
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(ask, run, 160, 48)
            time.sleep(5)
            os.kill(victim, signal.SIGKILL)
            assert asked.result() == [200] * 160  # the lost rank comes back under load, and no request is lost
        tokens = 40 * 16 + 160 * 48  # what is computed again is no token of an answer
        until(lambda: total(prometheus, "sum(stagemesh_generation_tokens_total)") == tokens, within_s=20)
        until(lambda: total(prometheus, "sum(increase(stagemesh_gang_rebuilds_total[15m]))") > 0, within_s=20)
        silent = []
        for panel in panels():
            for target in panel["targets"]:
                found = prometheus.query(filled(target["expr"], "15m", "15m"))
                # NaN: 0 / 0, where nothing happened; it is an answer as any
                if not found:
                    silent.append((panel["title"], target["expr"]))
        assert silent == []
        rules = prometheus.rules()
        assert {rule["health"] for rule in rules} == {"ok"}
        firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
        assert "StagemeshEpochChanged" in firing
        assert firing <= {"StagemeshEpochChanged", "StagemeshFirstTokenIsLate", "StagemeshServerErrors"}
