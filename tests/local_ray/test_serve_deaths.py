"""R9: Serve's controller, its proxy and the replica are killed, again and again: what clients see, and for how long."""

import contextlib
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.serving import Run, until

pytest.importorskip("ray")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

BODY = {"model": "stagemesh-demo", "prompt": "A stage", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
TIMES = 10
# The part of Serve that dies → the name of its process, how its streams may end, seconds until it serves at most
PARTS = {
    "controller": ("ray::ServeController", {"done"}, 30.0),
    "proxy": ("ray::ProxyActor", {"error", "cut"}, 30.0),
    "replica": ("ray::ServeReplica", {"error", "cut"}, 60.0),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with Run(tmp_path_factory.mktemp("run")) as run:
        run.wait_for()
        yield run


class Client(threading.Thread):
    """One request, and how it ended: done (as it should), error (said so), cut (the connection), or silence."""

    def __init__(self, run: Run, is_stream: bool) -> None:
        super().__init__(daemon=True)
        self._url = run.url + "/v1/completions"
        self._is_stream = is_stream
        self.text = ""
        self.end = ""
        self.start()

    def run(self) -> None:
        status = 0
        try:
            with httpx.stream("POST", self._url, json={**BODY, "stream": self._is_stream}, timeout=120) as response:
                status = response.status_code
                for part in response.iter_text():
                    self.text += part
        except httpx.TransportError:
            self.end = "cut"
            return
        if status == 200 and (self.text.endswith("data: [DONE]\n\n") if self._is_stream else self.text):
            self.end = "done"
        else:
            self.end = "error" if status != 200 or '"error"' in self.text else "silence"


def process_of(run: Run, name: str) -> psutil.Process | None:
    for process in run.processes():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(name):
                return process
    return None


def answers(run: Run, golden: str) -> bool:
    try:
        answer = run.post(BODY, timeout_s=10)
        return answer.status_code == 200 and answer.json()["choices"][0]["text"] == golden
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("part", PARTS)
def test_what_clients_see_when_a_part_of_serve_dies(run: Run, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, ends, within_s = PARTS[part]
    golden = run.post(BODY).json()["choices"][0]["text"]
    seen: dict[str, Counter[str]] = {"streams": Counter(), "plain": Counter()}
    back_s: list[float] = []
    for _ in range(TIMES):
        streams = [Client(run, True) for _ in range(2)]
        plain = [Client(run, False) for _ in range(2)]
        until(lambda streams=streams: all("data: " in stream.text for stream in streams), within_s=60)
        victim = process_of(run, name)
        assert victim is not None
        began = time.monotonic()
        victim.kill()
        victim.wait(10)
        until(lambda: answers(run, golden), within_s=120, every_s=0.1)
        back_s.append(time.monotonic() - began)
        for kind, clients in (("streams", streams), ("plain", plain)):
            for client in clients:
                client.join(120)
                seen[kind][client.end] += 1
        until(lambda: process_of(run, name) is not None, within_s=60, every_s=0.1)
        until(lambda: state_of(run).get("requests") == {"running": 0, "waiting": 0}, within_s=60, every_s=0.1)
    with capsys.disabled():
        told = {kind: dict(count) for kind, count in seen.items()}
        print(
            f"\n{part} killed {TIMES} times: {told}; answers again after "
            f"p50 {statistics.median(back_s):.1f} s, max {max(back_s):.1f} s"
        )
    assert set(seen["streams"]) <= ends
    assert set(seen["plain"]) <= ends
    assert max(back_s) < within_s


def state_of(run: Run) -> dict[str, Any]:
    with contextlib.suppress(httpx.TransportError, ValueError):
        return run.cluster()
    return {}
