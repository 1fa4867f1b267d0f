"""What our own code costs on the host: a step of the engine, and the way of a request through HTTP and engine.

    python benchmarks/host_time.py

The executor answers at once, so all that is measured is ours: ms a step of the engine by number of sequences that
decode, and ms from a request's first byte to its first chunk's, token ids given. Medians; the last line is JSON.
"""

import http.client
import json
import statistics
import threading
import time
from collections import deque
from pathlib import Path

import uvicorn

from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from actors.words.messages import Request, SamplingParams, StepBatch, StepResult
from cluster.topology import Topology
from configs.config import AdmissionConfig
from deployments.api.outbox import Outbox
from deployments.api.routes import build_app
from deployments.api.service import Identity, Limits, Service
from deployments.hosting import calm_collector
from deployments.text.tokenizer import Text

ROOT = Path(__file__).resolve().parents[1]
STEPS = 200
REQUESTS = 200


class AtOnce:
    """An executor whose every step has ended by the time that anybody asks; says the id 7."""

    shapes = ()

    def __init__(self) -> None:
        self.ready: deque[StepResult] = deque()
        self.bell = threading.Event()

    def submit(self, step: StepBatch) -> None:
        if step.entries:
            ids = [[7] for entry in step.entries if entry.sample]
            self.ready.append(StepResult(step.epoch, step.step, ids))

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        if not self.ready:
            self.bell.wait(timeout_s)
            self.bell.clear()
        return [self.ready.popleft()] if self.ready else []

    def wake(self) -> None:
        self.bell.set()

    def check(self) -> None: ...

    def close(self) -> None: ...


def settings(num_seqs: int) -> SchedulerSettings:
    tokens = max(2048, num_seqs)
    return SchedulerSettings(16, num_seqs, tokens, num_lanes=1, depth=2)


def step_ms(num_seqs: int) -> float:
    """One turn of the engine: a result in, events out, the next step made."""
    engine = Engine(AtOnce(), settings(num_seqs), num_seqs * 32, lambda events: None)
    engine._state = "ready"  # its thread is this one
    for number in range(num_seqs):
        engine.add(Request(f"r{number}", [3 + number % 90] * 64, 400, SamplingParams(temperature=0)))
    while engine.snapshot().waiting or any(seq.is_prefilling for seq in engine._scheduler._live.values()):
        engine._turn()
    took = []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine._turn()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3


def first_chunk_ms() -> float:
    """From a request's first byte to its first chunk's, over a loopback socket."""
    text, outbox = Text.load(ROOT / "configs" / "demo"), Outbox()
    engine = Engine(AtOnce(), settings(64), 64 * 32, outbox.deliver)
    identity = Identity("demo", "replica", "0", 0, Topology(1, 1))
    limits = Limits(max_model_len=512, vocab_size=512, admission=AdmissionConfig(), request_s=600.0)
    app = build_app(Service(engine, outbox, text, identity, limits, list))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    engine.start()
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    body = {"model": "demo", "prompt": [5] * 64, "max_tokens": 2, "temperature": 0, "stream": True, "ignore_eos": True}
    connection, took = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read(1)
        took.append(time.perf_counter() - began)
        response.read()
    server.should_exit = True
    thread.join(timeout=20)
    engine.close()
    text.close()
    return statistics.median(took) * 1e3


def main() -> None:
    calm_collector()
    steps = {count: round(step_ms(count), 3) for count in (32, 256, 1024)}
    for count, took in steps.items():
        print(f"engine, {count:4} sequences: {took:.2f} ms a step", flush=True)
    first = round(first_chunk_ms(), 2)
    print(f"HTTP and engine: {first:.2f} ms to the first chunk")
    print(json.dumps({"step_ms": steps, "first_chunk_ms": first}))


if __name__ == "__main__":
    main()
