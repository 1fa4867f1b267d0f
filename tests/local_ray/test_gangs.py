"""Gangs on Ray without Serve: a rank raises or hangs and requests go on; what starts and stops leaves nothing."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ray = pytest.importorskip("ray")

from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402

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
from deployments.hosting import GangHost  # noqa: E402
from tests.fakes.fake_executor import FakeExecutor  # noqa: E402
from tests.serving import is_alive, reserved, until  # noqa: E402
from tests.stubborn_transport.transport import StubbornActor  # noqa: E402

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("checkpoint")
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


def test_a_rank_that_cannot_be_aborted_is_ended_and_every_request_goes_on(
    bundles: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shard 1 is killed, and shard 0 waits for it in a kernel that does not hear of the end of the epoch.

    The size of the KV cache is measured, on both ranks together, and stays as it is.
    """
    from actors.tensors.model.spec_reader import read_spec

    groups = {"recovery": {"clean_s": 60.0}, "cache": {"memory_share": 0.002}}
    config = Config.model_validate(arguments(checkpoint, 2, 1) | groups)
    gang = type("StubbornGang", (Gang,), {"actor_class": StubbornActor})(config, Topology(2, 1), bundles, "cpu")
    gang.start(make_plan(config, read_spec(checkpoint, "float32")))
    listener, revivals = Listener(), []

    def revive(*asked: Any) -> Revival:
        revivals.append(gang.revive(*asked))
        return revivals[-1]

    num_blocks = gang.num_blocks
    engine = Engine(gang.executor, SchedulerSettings(16, 8, 64, 1), num_blocks, listener, revive)
    engine.start()
    try:
        before = [rank.pid for rank in gang.ranks()]
        engine.add(Request("whole", [5, 6, 7], 300, SamplingParams(0.0)))
        until(lambda: "whole" in listener.ends)
        engine.add(Request("cut", [5, 6, 7], 300, SamplingParams(0.0)))
        until(lambda: len(listener.ids.get("cut", [])) > 20)
        os.kill(before[1], signal.SIGKILL)
        until(lambda: "cut" in listener.ends)
        assert listener.ends["cut"] == ("length", None)
        assert listener.ids["cut"] == listener.ids["whole"]
        (revival,) = revivals
        assert gang.num_blocks == num_blocks >= 64
        assert revival.verdict.ranks == (1,), "who waits is not to blame"
        assert set(before).isdisjoint(rank.pid for rank in gang.ranks())
        assert revival.seconds["drain"] + revival.seconds["fence"] < config.recovery.clean_s / 2, revival.seconds
        with capsys.disabled():
            told = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in revival.seconds.items())
            print(f"\nseconds until a gang serves again whose rank could not be aborted: {told}")
    finally:
        gang.give_up()
        engine.close()
        gang.close()


@pytest.mark.parametrize("cycles", [1, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
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
    host = GangHost.__new__(GangHost)
    host._engine = engine
    engine.start()
    executor.fail(GangFailure("rank 1 died"))
    until(lambda: tries == [1], within_s=10)
    assert engine.snapshot().state == "recovering"
    host.check_health()  # green while there is hope
    may_fail.set()
    until(lambda: engine.snapshot().state == "failed", within_s=10)
    assert tries == [1, 2, 3]
    with pytest.raises(RuntimeError, match="the gang is lost: the gang did not come back: no way"):
        host.check_health()
    engine.close()
