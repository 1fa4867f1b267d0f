"""A stage's node goes: drained, the replica finishes what runs and starts elsewhere; lost, its streams just go on."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402

from deployments.app import build_app  # noqa: E402
from tests.serving import ROOT, free_port, until  # noqa: E402

pytestmark = [pytest.mark.soak, pytest.mark.timeout(500)]

STREAM = {"model": "tiny", "prompt": "A stage", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """The head with the replica and stage 0, and two nodes that stage 1 may be on."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def url(cluster: Any) -> str:
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    args = {
        "model": {"source": str(ROOT / "configs/demo"), "name": "tiny", "dtype": "float32", "max_model_len": 512},
        "parallel": {"pipeline_parallel_size": 2},
        "device": "cpu",
        "cache": {"num_blocks": 256},
        "placement": {"cpus_per_rank": 0.5, "cpus_per_replica": 0.25, "strategy": "STRICT_SPREAD"},
        "timeouts": {"drain_s": 90.0},
    }
    serve.run(build_app(args), name="drained", route_prefix="/")
    return f"http://127.0.0.1:{port}"


class Stream(threading.Thread):
    """One stream, and all that it said."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.text = ""
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url + "/v1/completions", json=STREAM, timeout=120) as response:
            for part in response.iter_text():
                self.text += part


def texts(stream: Stream) -> str:
    """What a stream brought, without ids and times."""
    events = [line[len("data: ") :] for line in stream.text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_a_stage_whose_node_is_lost_goes_on_where_another_has_room(
    cluster: Any, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> Any:
        return httpx.get(url + "/cluster", timeout=20).json()

    alone = Stream(url)
    alone.join(120)
    assert alone.text.endswith("data: [DONE]\n\n")
    before = state()
    second = before["ranks"][1]["node"]
    streams = [Stream(url) for _ in range(3)]
    until(lambda: all("data: " in stream.text for stream in streams), within_s=60)
    began = time.monotonic()
    (node,) = (node for node in cluster.list_all_nodes() if node.node_id == second)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)  # the drain needs another one
    for stream in streams:
        stream.join(200)
    took_s = time.monotonic() - began
    assert [texts(stream) for stream in streams] == [texts(alone)] * 3
    assert all(stream.text.endswith("data: [DONE]\n\n") for stream in streams)
    after = state()
    assert (after["replica"], after["state"]) == (before["replica"], "ready")
    assert after["epoch"] > before["epoch"]
    assert after["ranks"][1]["node"] != second
    assert after["ranks"][0]["pid"] == before["ranks"][0]["pid"], "who survived stays"
    with capsys.disabled():
        print(f"\nnode lost: all streams ended {took_s:.1f} s later, epoch {after['epoch']}")


def test_a_stage_whose_node_is_drained_moves_and_loses_nothing(
    cluster: Any, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.core.generated import autoscaler_pb2

    def get(route: str) -> httpx.Response:
        return httpx.get(url + route, timeout=20)

    before = get("/cluster").json()
    own, second = (rank["node"] for rank in before["ranks"])
    assert own != second
    streams = [Stream(url) for _ in range(3)]
    until(lambda: all("data: " in stream.text for stream in streams), within_s=60)
    began = time.monotonic()
    client = ray._raylet.GcsClient(address=cluster.address)
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    assert client.drain_node(second, reason, "a test", int((time.time() + 300) * 1000))[0]
    unready_s = until(lambda: get("/ready").status_code == 503, within_s=10)
    answer = httpx.post(url + "/v1/completions", json={**STREAM, "stream": False}, timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_draining"), answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    for stream in streams:
        stream.join(120)
    assert [stream.text.endswith("data: [DONE]\n\n") for stream in streams] == [True] * 3

    def is_elsewhere() -> bool:
        try:
            state = get("/cluster").json()
            return state["replica"] != before["replica"] and get("/ready").status_code == 200
        except (httpx.TransportError, json.JSONDecodeError, KeyError):
            return False

    until(is_elsewhere, within_s=200, every_s=0.2)
    assert second not in {rank["node"] for rank in get("/cluster").json()["ranks"]}
    with capsys.disabled():
        print(f"\nnode drained: refused after {unready_s:.1f} s, elsewhere after {time.monotonic() - began:.1f} s")
