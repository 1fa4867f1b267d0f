"""The step channel: who may speak, what is delivered, and that silence, strangers and nonsense do no harm."""

import contextlib
import socket
import threading
import time

import pytest
import zmq

from actors.decisions.failure import patience
from actors.remote.channel import ChannelAddress, EngineChannel, KeyPair
from actors.remote.rank_channel import RankChannel
from actors.words.errors import GangFailure
from actors.words.messages import (
    Bucket,
    Capture,
    Captured,
    Entry,
    NewSequence,
    SamplingParams,
    Shutdown,
    StepBatch,
    StepResult,
)

STEP = StepBatch(1, 0, 0, [NewSequence(7, SamplingParams(0.5, 3), [])], [2], [Entry(7, 0, [1, 2], [4], True)])


@pytest.fixture
def engine():
    channel = EngineChannel("127.0.0.1", epoch=1)
    yield channel
    channel.close()


def connect(engine, count=2):
    keys = [KeyPair.make() for _ in range(count)]
    engine.admit([pair.public for pair in keys])
    ranks = [RankChannel(engine.address, pair, rank, epoch=1) for rank, pair in enumerate(keys)]
    engine.wait_for_ranks(10)
    return ranks


def test_a_step_reaches_every_rank_and_its_result_comes_back(engine):
    ranks = connect(engine, 4)
    engine.submit(STEP)
    assert [rank.receive() for rank in ranks] == [STEP] * 4
    ranks[3].answer(StepResult(1, 0, [[9]]))
    assert engine.wait(10) == [StepResult(1, 0, [[9]])]
    engine.close()
    assert [rank.receive() for rank in ranks] == [Shutdown(1)] * 4
    for rank in ranks:
        rank.close()


def test_a_capture_reaches_every_rank_and_ends_when_all_have_reported(engine):
    ranks, bucket = connect(engine), Bucket(8, 8, 3, True)
    engine.submit(STEP)
    engine.capture(bucket)
    assert [[rank.receive() for _ in range(2)] for rank in ranks] == [[STEP, Capture(1, bucket)]] * 2
    ranks[1].answer(StepResult(1, 0, [[9]]))
    assert engine.wait(10) == [StepResult(1, 0, [[9]])]
    ranks[1].answer(Captured(1, bucket))
    assert engine.wait(0.3) == [] and engine.take_captured() == [] and engine.clock.is_capturing
    ranks[0].answer(Captured(1, bucket, "no room"))
    assert engine.wait(10) == []
    assert engine.take_captured() == [Captured(1, bucket, "no room")] and engine.take_captured() == []
    assert not engine.clock.is_capturing
    engine.capture(bucket)
    for rank in ranks:
        rank.close()


def test_a_rank_that_hangs_in_a_capture_is_found(engine, monkeypatch):
    monkeypatch.setattr(patience, "_CAPTURE_S", 0.2)
    ranks = connect(engine)
    engine.capture(Bucket(8, 8, 3, True))
    with pytest.raises(GangFailure, match="capturing a graph takes too long; rank 0 is furthest behind"):
        engine.wait(10)
    for rank in ranks:
        rank.close()


def test_wake_and_fail_end_a_wait(engine):
    ranks = connect(engine)
    threading.Timer(0.05, engine.wake).start()
    assert engine.wait(None) == []
    threading.Timer(0.05, engine.fail, ["rank 1 died", 1]).start()
    with pytest.raises(GangFailure, match="rank 1 died"):
        engine.wait(None)
    for rank in ranks:
        rank.close()


def test_a_rank_reports_its_own_failure(engine):
    ranks = connect(engine)
    ranks[1].report(ValueError("bad block"))
    with pytest.raises(GangFailure, match="rank 1 failed at step -1: ValueError: bad block"):
        engine.wait(10)
    for rank in ranks:
        rank.close()


def test_who_died_is_named_not_who_noticed(engine):
    ranks = connect(engine)
    ranks[1].report(RuntimeError("the neighbor closed it or died"))
    threading.Timer(0.05, engine.fail, ["rank 0 died", 0]).start()
    with pytest.raises(GangFailure, match=r"^rank 0 died$"):
        engine.wait(10)
    for rank in ranks:
        rank.close()


def test_silence_is_noticed_though_others_wake_the_engine_all_the_time(engine):
    ranks = connect(engine)
    ranks[1]._send = lambda socket, message: None  # its heartbeat ends, its connection stays
    deadline = time.monotonic() + 20
    with pytest.raises(GangFailure, match="nothing is heard from rank 1: "):
        while time.monotonic() < deadline:
            engine.wake()
            engine.wait()
    for rank in ranks:
        rank.close()


def test_only_admitted_keys_are_heard(engine):
    ranks = connect(engine)
    stranger = RankChannel(engine.address, KeyPair.make(), 1, epoch=1)
    stranger.answer(StepResult(1, 0, [[666]]))
    wrong_server = RankChannel(ChannelAddress(engine.address.endpoint, KeyPair.make().public), KeyPair.make(), 0, 1)
    assert engine.wait(0.5) == []
    for rank in [*ranks, stranger, wrong_server]:
        rank.close()


def test_an_old_epoch_is_not_heard(engine):
    keys = KeyPair.make()
    engine.admit([keys.public])
    old = RankChannel(engine.address, keys, 0, epoch=0)
    old.answer(StepResult(0, 0, [[1]]))
    assert engine.wait(0.5) == []
    assert engine.progress_by_rank == {}
    old.close()


def test_a_rank_that_never_comes_is_named(engine):
    engine.admit([KeyPair.make().public, KeyPair.make().public])
    with pytest.raises(GangFailure, match=r"ranks \[0, 1\] did not reach"):
        engine.wait_for_ranks(0.3)


def test_random_bytes_and_plain_zeromq_do_no_harm(engine):
    ranks = connect(engine)
    host, port = engine.address.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        with contextlib.suppress(OSError):  # hung up on, as it should be
            raw.sendall(bytes(range(256)) * 4096)
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(engine.address.endpoint)
        plain.send(b"no curve")
        assert engine.wait(0.3) == []
    engine.submit(STEP)
    ranks[0].answer(StepResult(1, 0, [[5]]))
    assert engine.wait(10) == [StepResult(1, 0, [[5]])]
    for rank in ranks:
        rank.close()


def test_heartbeats_tell_rank_and_step(engine):
    ranks = connect(engine)
    engine.submit(STEP)
    ranks[1].receive()
    deadline = time.monotonic() + 10
    while engine.progress_by_rank[1].step != 0 and time.monotonic() < deadline:
        engine.wait(0.2)
    assert engine.progress_by_rank[1].step == 0
    for rank in ranks:
        rank.close()
