"""Faults on Ray: ranks and the replica are killed, stopped and interrupted while they answer, and all comes back."""

import json
import os
import random
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group  # noqa: E402

from actors.decisions.model.plan import make_plan  # noqa: E402
from actors.decisions.schedule.settings import SchedulerSettings  # noqa: E402
from actors.remote.actor_pool import RankActor  # noqa: E402
from actors.remote.engine import Engine  # noqa: E402
from actors.remote.gang import Gang  # noqa: E402
from actors.words.errors import GangFailure, Verdict  # noqa: E402
from actors.words.executor import Revival  # noqa: E402
from actors.words.messages import Event, Request, SamplingParams  # noqa: E402
from cluster.topology import Topology  # noqa: E402
from configs.config import Config  # noqa: E402
from deployments.app import build_app  # noqa: E402
from deployments.serve.replica import Replica  # noqa: E402
from tests.fakes.fake_executor import FakeExecutor  # noqa: E402
from tests.serving import PATIENCE_S, Served, free_port, is_alive, until  # noqa: E402

pytestmark = pytest.mark.timeout(300)

STREAM = {"prompt": [5, 6, 7, 8], "ignore_eos": True, "temperature": 0}
GOLDEN = {"prompt": [9, 10, 11], "max_tokens": 24, "ignore_eos": True, "temperature": 0}
NUM_STREAMS = 3
FAULTS = {"dies": (signal.SIGKILL, 3.0), "stops": (signal.SIGSTOP, 5.0)}  # → promised seconds until it is noticed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model; its tokenizer knows bytes only."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=4,
        intermediate_size=96,
        bos_token_id=None,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def arguments(checkpoint: Path, tensor_parallel_size: int, pipeline_parallel_size: int) -> dict[str, Any]:
    """The `args` of a config file."""
    return {
        "model": {"source": str(checkpoint), "name": "tiny", "dtype": "float32", "max_model_len": 1024},
        "parallel": {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
        },
        "device": "cpu",
        "cache": {"num_blocks": 512},
        "scheduler": {"max_num_seqs": 12},
        "placement": {"cpus_per_rank": 0.25, "cpus_per_replica": 0.5},
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of its own."""
    ray.init(address="local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, namespace="serve")
    yield
    ray.shutdown()


@dataclass
class App(Served):
    """A served gang of 2 x 2 ranks, as its clients see it, and what its faults cost."""

    golden: str = ""
    golden_stream: str = ""
    cold_start_s: float = 0.0
    told: list[tuple[str, int, float, float]] = field(default_factory=list)  # fault, rank, noticed, ready again (s)

    def answer(self) -> str:
        """The answer that never changes."""
        response = self.post({"model": "tiny", **GOLDEN})
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text


@pytest.fixture(scope="module")
def app(cluster: None, checkpoint: Path) -> Iterator[App]:
    """Served once for all cases."""
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    began = time.monotonic()
    serve.run(build_app(arguments(checkpoint, 2, 2)), name="faults", route_prefix="/")
    app = App(f"http://127.0.0.1:{port}")
    until(app.is_ready)
    app.cold_start_s = time.monotonic() - began
    app.golden = app.answer()
    client = Client(app, stream=False)
    client.join(120)
    app.golden_stream = client.text()
    yield app
    serve.shutdown()


class Client(threading.Thread):
    """One request in a thread of its own, and all that was answered."""

    def __init__(self, app: App, stream: bool = True, max_tokens: int = 240) -> None:
        super().__init__(daemon=True)
        self._url = app.url + "/v1/completions"
        self._body = {"model": "tiny", "stream": stream, **STREAM, "max_tokens": max_tokens}
        self.status = 0
        self.lines: list[str] = []
        self.said_at: list[float] = []  # of each line
        self.cut = False  # the connection was lost
        self.timeout_s = 120.0  # more than any pause that a lost rank costs
        self.began = time.monotonic()
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=self.timeout_s) as response:
                self.status = response.status_code
                for line in filter(None, response.iter_lines()):
                    self.said_at.append(time.monotonic())
                    self.lines.append(line)
        except httpx.TransportError:
            self.cut = True

    def text(self) -> str:
        """What was answered, which must have come to its end, once."""
        assert (self.status, self.cut) == (200, False), self.lines[-2:]
        if not self._body["stream"]:
            (line,) = self.lines
            answer = json.loads(line)
            assert answer["usage"]["completion_tokens"] == self._body["max_tokens"]
            text: str = answer["choices"][0]["text"]
            return text
        assert [line for line in self.lines if "[DONE]" in line] == self.lines[-1:]
        chunks = [json.loads(line.removeprefix("data: ")) for line in self.lines[:-1] if line.startswith("data: ")]
        ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        assert ends == ["length"]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


QUICK = [("dies", 1)]  # tests/chaos/test_short.py stops a rank; `-m soak` runs the others


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        pytest.param(fault, rank, marks=() if (fault, rank) in QUICK else pytest.mark.soak)
        for fault in FAULTS
        for rank in range(4)
    ],
)
def test_a_failing_rank_is_noticed_and_every_request_goes_on(app: App, fault: str, rank: int) -> None:
    number, promised_s = FAULTS[fault]
    before, pids = app.cluster(), app.pids()
    clients = [Client(app) for _ in range(NUM_STREAMS)] + [Client(app, stream=False)]
    until(lambda: all(len(client.lines) > 3 for client in clients[:-1]))
    began = time.monotonic()
    os.kill(pids[rank], number)
    until(lambda: app.status("/ready") == 503)
    noticed_s = time.monotonic() - began
    late = Client(app, max_tokens=50)  # waits for the gang
    health = set()

    def is_back() -> bool:
        health.add(app.status("/health"))
        return app.status("/ready") == 200

    until(is_back, every_s=0.1)
    app.told.append((fault, rank, noticed_s, time.monotonic() - began))
    for client in clients:
        client.join(PATIENCE_S)
        assert client.text() == app.golden_stream
    late.join(PATIENCE_S)
    assert late.text() == app.golden_stream[: len(late.text())] != ""
    after = app.cluster()
    assert after["epoch"] == before["epoch"] + 1
    assert after["replica"] == before["replica"]  # Serve's own check stayed green
    assert health == {200}
    assert [old == new for old, new in zip(pids, app.pids(), strict=True)] == [other != rank for other in range(4)]
    assert app.answer() == app.golden
    until(lambda: not is_alive(pids[rank]), within_s=10)
    cause = "killed" if fault == "dies" else "silent"
    metrics = app.get("/metrics").text
    told = re.search(rf'gang_rebuilds_total{{cause="{cause}".*}} (\S+)', metrics)
    assert told is not None
    assert float(told.group(1)) > 0
    assert noticed_s < promised_s


def test_the_table_of_faults(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    """What the faults above cost; recovery is told as a share of a start of replica and gang, as machines differ."""
    with capsys.disabled():
        print(f"\nstart of replica and gang: {app.cold_start_s:.1f} s\nfault   rank  noticed (s)  ready again (starts)")
        for fault, rank, noticed_s, ready_s in app.told:
            print(f"{fault:7} {rank:4} {noticed_s:12.2f} {ready_s / app.cold_start_s:21.2f}")
    assert all(noticed_s < FAULTS[fault][1] for fault, _, noticed_s, _ in app.told)


@pytest.mark.parametrize("stopped", [2, pytest.param(None, marks=pytest.mark.soak)])
def test_no_rank_outlives_its_replica(app: App, stopped: int | None) -> None:
    before, pids, groups = app.cluster(), app.pids(), reserved()
    client = Client(app)
    until(lambda: len(client.lines) > 3)
    if stopped is not None:
        os.kill(pids[stopped], signal.SIGSTOP)
    replica = replica_of(app)
    replica.kill()
    until(lambda: not any(map(is_alive, pids)), within_s=10)
    client.join(60)
    assert "[DONE]" not in "".join(client.lines)
    until(app.is_ready)
    after = app.cluster()
    assert (after["replica"] != before["replica"], after["epoch"]) == (True, 0)
    assert app.answer() == app.golden
    until(lambda: len(reserved()) == len(groups), within_s=10)
    assert not reserved() & groups


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_clients_that_disconnect_leave_nothing(app: App, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """At random moments: queued, in the middle of a prompt, while decoding, with n = 4, streamed and plain."""
    chance = random.Random(count)
    fds_before, threads_before = replica_of(app).num_fds(), replica_of(app).num_threads()
    segments_before = mapped_segments(replica_of(app))
    seen = {"waiting": 0, "running": 0}
    threads: list[threading.Thread] = []
    for _ in range(count):
        body = {
            "model": "tiny",
            "prompt": [chance.randrange(256) for _ in range(chance.choice((4, 60, 800)))],
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": chance.random() < 0.7,
            "n": chance.choice((1, 1, 4)),
            "seed": 1,
        }
        threads.append(threading.Thread(target=leave_early, args=(app, body, chance.expovariate(4))))
        threads[-1].start()
        if len(threads) % 4 == 0:
            state = app.cluster()["requests"]
            seen = {name: max(most, state[name]) for name, most in seen.items()}
        time.sleep(chance.expovariate(60))
    for thread in threads:
        thread.join(60)
    idle_s = until(lambda: (app.cluster()["requests"], app.cluster()["kv_blocks"]["used"]) == (IDLE, 0), within_s=2.0)
    assert min(seen.values()) > 0, f"nobody was queued, or nobody ran: {seen}"
    assert app.answer() == app.golden
    until(lambda: replica_of(app).num_fds() <= fds_before + 2, within_s=10)
    assert mapped_segments(replica_of(app)) == segments_before
    with capsys.disabled():
        told = f"fds {fds_before} → {replica_of(app).num_fds()}, threads {threads_before} → "
        print(f"\n{count} disconnects: idle after {idle_s:.2f} s; {told}{replica_of(app).num_threads()}")


def mapped_segments(process: psutil.Process) -> int:
    """Pieces of shared memory that a process maps."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    # By device and inode: what has no name any more ends in the same word, "(deleted)"
    return len({tuple(line.split()[3:5]) for line in lines if "/dev/shm/" in line or "memfd:" in line})


IDLE = {"running": 0, "waiting": 0}


def leave_early(app: App, body: dict[str, Any], after_s: float) -> None:
    """Send a request, and after a while reset the connection under it."""
    host, _, port = app.url.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(after_s)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no farewell


def replica_of(app: App) -> psutil.Process:
    """The process that serves HTTP."""
    (replica,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica:faults")
    ]
    return replica


def reserved() -> set[str]:
    """The placement groups that hold something."""
    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


@pytest.mark.parametrize(("seconds", "share"), [(6.0, 0.10), pytest.param(60.0, 0.05, marks=pytest.mark.soak)])
def test_an_idle_gang_costs_nothing_and_answers_at_once(app: App, seconds: float, share: float) -> None:
    """5 % of a core is promised; over six seconds the noise is larger, so that 10 % are let pass there."""
    under_load = [first_token_s(app) for _ in [Client(app, max_tokens=100) for _ in range(NUM_STREAMS)]]
    until(lambda: app.cluster()["requests"]["running"] == 0)
    time.sleep(0.5)
    pids = set(app.pids())
    processes = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid in pids or any("ServeReplica:faults" in word for word in process.cmdline()[:1])
    ]
    assert len(processes) == 5
    began, before = time.monotonic(), cpu_s(processes)
    time.sleep(seconds)
    used = (cpu_s(processes) - before) / (time.monotonic() - began)
    idle_s = min(first_token_s(app) for _ in range(3))
    assert used < share
    assert idle_s < 2 * min(under_load)  # twice: one measurement each is not more exact than that


def cpu_s(processes: list[psutil.Process]) -> float:
    """Processor seconds so far, from /proc."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def first_token_s(app: App) -> float:
    client = Client(app, max_tokens=2)
    client.join(60)
    return client.said_at[0] - client.began


@pytest.fixture(scope="module")
def bundles(cluster: None) -> Iterator[Any]:
    """What a gang of two stages needs, without Serve."""
    group = placement_group([{"CPU": 0.5}, {"CPU": 0.5}], strategy="PACK")
    ray.get(group.ready(), timeout=60)
    yield group
    remove_placement_group(group)


def listening() -> set[int]:
    """Ports that this process and what it started listen on."""
    pids = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    return {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids
    }


class Listener:
    """Takes an engine's events."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.ends: dict[str, tuple[str | None, str | None]] = {}
        self.gained_at = 0.0  # when an id came last
        self.failed_at = 0.0  # when an error came last

    def __call__(self, events: list[Event]) -> None:
        for event in events:
            self.ids.setdefault(event.request_id, []).extend(event.token_ids)
            if event.token_ids:
                self.gained_at = time.monotonic()
            if event.finish_reason:
                assert event.request_id not in self.ends
                self.ends[event.request_id] = event.finish_reason, event.error
                if event.error:
                    self.failed_at = time.monotonic()


def faulty_gang(faults: tuple[tuple[str, int], ...]) -> type[Gang]:
    """A gang in which by epoch one rank raises in its tenth step, or stays in it and goes on to say that it lives."""

    class FaultyActor(RankActor):
        _steps_left = 0  # never
        _fault = ""

        def call(self, method: str, *args: Any) -> Any:
            if method == "join" and args[0].epoch < len(faults) and faults[args[0].epoch][1] == self._rank_number:
                self._fault, self._epoch_steps = faults[args[0].epoch][0], 10
            if method == "serve":
                self._steps_left = self.__dict__.pop("_epoch_steps", 0)
                if not hasattr(self, "_launch"):
                    runner = self._rank._runner
                    self._launch, runner.launch = runner.launch, self._fail_soon
            return super().call(method, *args)

        def _fail_soon(self, step: Any) -> Any:
            self._steps_left -= 1
            if not self._steps_left and self._fault == "hangs":
                time.sleep(600)
            if not self._steps_left:
                raise ArithmeticError("a fault that a test has put in")
            return self._launch(step)

    class FaultyGang(Gang):
        actor_class = FaultyActor

    return FaultyGang


WORDS = {
    "raises": r"rank {rank} failed at step \d+: ArithmeticError: a fault that a test has put in",
    "hangs": r"step \d+ takes far longer than steps do; rank {rank} is furthest behind, at step \d+, collective \d+",
}


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param((("raises", 1), ("hangs", 2)), id="one of each"),
        pytest.param(tuple(("raises", rank) for rank in range(4)), id="all raise", marks=pytest.mark.soak),
        pytest.param(tuple(("hangs", rank) for rank in range(4)), id="all hang", marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_raises_or_hangs_is_noticed_and_every_request_goes_on(
    bundles: Any, checkpoint: Path, faults: tuple[tuple[str, int], ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Serve: neither can be put into a rank from outside."""
    from actors.tensors.model.spec_reader import read_spec

    config = Config.model_validate(arguments(checkpoint, 2, 2) | {"recovery": {"clean_s": 1.0}})
    gang = faulty_gang(faults)(config, Topology(2, 2), bundles, "cpu")
    gang.start(make_plan(config, read_spec(checkpoint, "float32")))
    listener, reasons, noticed_s = Listener(), [], []

    def revive(epoch: int, verdict: Verdict, is_fresh: bool) -> Revival:
        noticed_s.append(time.monotonic() - listener.gained_at)
        reasons.append(verdict.reason)
        return gang.revive(epoch, verdict, is_fresh)

    engine = Engine(gang.executor, SchedulerSettings(16, 8, 64, 2), 512, listener, revive)
    engine.start()
    try:
        pids = [rank.pid for rank in gang.ranks()]
        for number in range(4):  # each fault befalls them again
            engine.add(Request(f"faulty-{number}", [5, 6, 7 + number], 100, SamplingParams(0.0)))
        until(lambda: len(listener.ends) == 4)
        assert set(listener.ends.values()) == {("length", None)}
        for (fault, rank), reason in zip(faults, reasons, strict=True):
            assert re.fullmatch(WORDS[fault].format(rank=rank), reason), reasons
        assert engine.failure == reasons[-1]
        assert (engine.snapshot().state, engine.snapshot().epoch) == ("ready", len(faults))
        for number in range(4):
            engine.add(Request(f"sound-{number}", [5, 6, 7 + number], 100, SamplingParams(0.0)))
        until(lambda: sum(name.startswith("sound") for name in listener.ends) == 4)
        for name, ids in listener.ids.items():
            assert ids == listener.ids[f"sound-{name[-1]}"], name
        stays = [old == new.pid for old, new in zip(pids, gang.ranks(), strict=True)]
        assert stays == [("hangs", rank) not in faults for rank in range(4)]
        with capsys.disabled():
            told = zip(faults, noticed_s, strict=True)
            words = ", ".join(f"rank {rank} {fault} {seconds:.2f}" for (fault, rank), seconds in told)
            print(f"\nseconds from the last id to the verdict: {words}")
        assert max(noticed_s) < 3.0
    finally:
        gang.give_up()
        engine.close()
        gang.close()


@pytest.mark.parametrize("cycles", [2, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_starting_and_stopping_gangs_leaves_nothing(bundles: Any, checkpoint: Path, cycles: int) -> None:
    from actors.tensors.model.spec_reader import read_spec

    spec = read_spec(checkpoint, "float32")
    left: list[tuple[int, int, set[str], int]] = []
    for cycle in range(cycles + 1):  # the first warms up what stays: threads, caches
        layout = ((2, 1), (1, 2))[cycle % 2]
        config = Config.model_validate(arguments(checkpoint, *layout))
        gang = Gang(config, Topology(*layout), bundles, "cpu", epoch=cycle)
        gang.start(make_plan(config, spec))
        pids = [rank.pid for rank in gang.ranks()]
        assert all(map(is_alive, pids))
        gang.close()
        until(lambda pids=pids: not any(map(is_alive, pids)), within_s=10)
        shared = sum(
            "/dev/shm/" in line or "memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines()
        )
        left.append((psutil.Process().num_fds(), len(listening()), reserved(), shared))
    first, last = left[0], left[-1]
    assert last[0] <= first[0] + 2, [fds for fds, *_ in left]
    assert last[1:] == first[1:]


def test_a_gang_that_cannot_come_back_fails_the_health_check() -> None:
    tries: list[int] = []
    may_fail = threading.Event()

    def revive(epoch: int, verdict: Verdict, is_fresh: bool) -> Any:
        tries.append(epoch)
        may_fail.wait(30)
        raise GangFailure("no way")

    executor = FakeExecutor()
    engine = Engine(executor, SchedulerSettings(16, 8, 64, 2), 64, lambda events: None, revive)
    replica = Replica.__new__(Replica)
    replica._engine = engine
    engine.start()
    executor.fail(GangFailure("rank 1 died"))
    until(lambda: tries == [1], within_s=10)
    assert engine.snapshot().state == "recovering"
    replica.check_health()  # green while there is hope
    may_fail.set()
    until(lambda: engine.snapshot().state == "failed", within_s=10)
    assert tries == [1, 2, 3]
    with pytest.raises(RuntimeError, match="the gang is lost: the gang did not come back: no way"):
        replica.check_health()
    engine.close()
