"""Which shape is captured next, and when: seldom under load, the most wanted first, never what ended the ranks."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from actors.decisions.failure.patience import StepClock
from actors.decisions.schedule.buckets import Buckets
from actors.decisions.schedule.captures import CaptureRound, Captures
from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from actors.words.errors import GangFailure, Verdict
from actors.words.executor import Revival
from actors.words.messages import Bucket, Captured, Entry, Request, SamplingParams, StepBatch
from tests.fakes.fake_executor import FakeExecutor

SETTINGS = SchedulerSettings(block_size=16, max_num_seqs=8, max_num_batched_tokens=64, num_lanes=1)
SHAPES = Buckets.of(SETTINGS, 10, 512).shapes
LARGEST, EIGHT, FOUR, ONE = (
    Bucket(64, 8, 10, False), Bucket(8, 8, 10, True), Bucket(4, 4, 10, True), Bucket(1, 1, 10, True),
)  # fmt: skip


def fresh() -> Captures:
    captures = Captures(16)
    captures.begin_epoch(SHAPES, is_to_blame=False)
    return captures


def decode(captures: Captures, num_rows: int, num_steps: int) -> None:
    for _ in range(num_steps):
        captures.submitted(StepBatch(0, 0, 0, [], [], [Entry(seq, 5, [], [], True) for seq in range(num_rows)]))


def end(captures: Captures, bucket: Bucket | None, reason_not: str | None = None) -> Bucket | None:
    assert bucket is not None
    captures.ended(Captured(0, bucket, reason_not))
    return bucket


def test_under_load_the_largest_is_first_then_what_most_steps_wanted() -> None:
    captures = fresh()
    decode(captures, 1, 20)
    decode(captures, 3, 25)
    assert captures.order(is_idle=False) is None, "not so soon"
    decode(captures, 1, 10)
    assert end(captures, captures.order(is_idle=False)) == LARGEST
    assert captures.order(is_idle=False) is None
    decode(captures, 1, 50)
    assert captures.order(is_idle=False) == ONE
    decode(captures, 1, 50)
    assert captures.order(is_idle=False) is None, "one at a time"
    end(captures, ONE)
    assert end(captures, captures.order(is_idle=False)) == FOUR
    decode(captures, 1, 60)
    assert captures.order(is_idle=False) is None, "nothing else is wanted"
    assert captures.state.num_captured == 3 and captures.state.num_shapes == len(SHAPES)


def test_idle_ranks_capture_everything_decode_steps_first() -> None:
    captures = fresh()
    order = [end(captures, captures.order(is_idle=True)) for _ in SHAPES]
    assert order[:3] == [LARGEST, EIGHT, FOUR]
    assert [shape.is_decode for shape in order[1:]] == [True] * 4 + [False] * 2
    assert captures.order(is_idle=True) is None


def test_what_fails_is_left_and_who_always_fails_is_not_asked_again() -> None:
    captures = fresh()
    failed = [end(captures, captures.order(is_idle=True), "no room") for _ in range(3)]
    assert captures.order(is_idle=True) is None
    assert captures.state.failed == dict.fromkeys(failed, "no room")
    captures.begin_epoch(SHAPES, is_to_blame=True)
    assert captures.order(is_idle=True) == LARGEST, "other ranks may succeed"


def test_captures_that_end_the_ranks_come_to_an_end() -> None:
    captures = fresh()
    for _ in range(3):
        assert captures.order(is_idle=True) is not None
        captures.begin_epoch(SHAPES, is_to_blame=True)
    assert captures.order(is_idle=True) is None


@pytest.mark.parametrize("is_to_blame", [True, False])
def test_a_capture_that_ends_the_ranks_is_not_ordered_again(is_to_blame: bool) -> None:
    captures = fresh()
    end(captures, captures.order(is_idle=True))
    assert captures.order(is_idle=True) == EIGHT
    captures.begin_epoch(SHAPES, is_to_blame)
    assert not captures.captured
    assert end(captures, captures.order(is_idle=True)) in (
        (LARGEST, EIGHT) if not is_to_blame else (EIGHT, FOUR, LARGEST)
    )
    order = [end(captures, captures.order(is_idle=True)) for _ in range(len(SHAPES) - 1 - is_to_blame)]
    assert (EIGHT in order) is not is_to_blame
    assert captures.order(is_idle=True) is None


def test_a_device_without_graphs_is_asked_for_nothing() -> None:
    captures = Captures(16)
    decode(captures, 1, 200)
    assert captures.order(is_idle=True) is None and captures.order(is_idle=False) is None


def test_a_capture_ends_when_all_ranks_have_reported_and_fails_where_one_fails() -> None:
    round_ = CaptureRound(ONE, 3)
    assert round_.take(1, Captured(0, ONE, "no room")) is None
    assert round_.take(0, Captured(0, ONE)) is None
    assert round_.take(0, Captured(0, ONE)) is None
    assert round_.take(2, Captured(0, ONE)) == Captured(0, ONE, "no room")
    round_ = CaptureRound(ONE, 1)
    assert round_.take(0, Captured(0, ONE)) == Captured(0, ONE)


def test_a_capture_may_take_long_and_says_nothing_of_steps() -> None:
    clock = StepClock(60.0)
    clock.submitted(0, 1, 100.0)
    clock.completed(100.1)
    clock.submitted(1, 1, 100.2)
    assert clock.deadline is not None and clock.deadline < 104
    clock.capture_ordered(100.3)
    clock.submitted(2, 1, 100.3)
    assert clock.is_capturing and clock.deadline > 140
    clock.completed(100.4)  # step 1 ran before it
    clock.capture_ended(110.0)
    assert not clock.is_capturing and 112 < clock.deadline < 114
    clock.completed(110.1)
    clock.submitted(3, 1, 111.0)
    assert clock.deadline < 114, "what the capture took is no step's time"
    clock.completed(111.1)
    clock.capture_ordered(112.0)
    assert clock.oldest is None and clock.deadline > 150, "an idle gang may hang in it, too"
    clock.begin_epoch()
    assert clock.deadline is None


class Served:
    """An engine over an executor whose ranks have graphs."""

    def __init__(self, revive: Callable[..., Revival] | None = None) -> None:
        self.executor = self.with_graphs()
        self.events: list[Any] = []
        self.engine = Engine(self.executor, SETTINGS, 40, self.events.extend, revive)
        self.engine.start()

    @staticmethod
    def with_graphs() -> FakeExecutor:
        executor = FakeExecutor()
        executor.shapes = list(SHAPES)
        return executor

    def generate(self, name: str, max_tokens: int) -> None:
        self.engine.add(Request(name, [1, 2, 3], max_tokens, SamplingParams(temperature=0)))
        until(lambda: any(event.request_id == name and event.finish_reason for event in self.events))


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.timeout(60)
def test_the_engine_orders_one_capture_after_the_other_while_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    served, resumed = Served(), []
    monkeypatch.setattr(served.engine._scheduler._step_times, "stopped", resumed.append)
    until(lambda: served.executor.ordered == [LARGEST])
    served.generate("a", 120)
    assert served.executor.ordered == [LARGEST], "one at a time, whatever runs meanwhile"
    for number in range(1, len(SHAPES)):
        served.executor.end_capture()
        until(lambda number=number: len(served.executor.ordered) == number + 1)  # type: ignore[misc]
    assert served.executor.ordered[1] == ONE, "what ran most"
    served.executor.end_capture("no room")
    until(lambda: len(served.engine.snapshot().graphs.failed) == 1)
    assert served.engine.snapshot().graphs.num_captured == len(SHAPES) - 1
    assert len(resumed) == len(SHAPES), "what a capture takes is no step's time"
    served.engine.close()


@pytest.mark.timeout(60)
def test_a_new_epoch_captures_anew_but_not_what_ended_the_last() -> None:
    nxt = Served.with_graphs()
    verdict = Verdict("crashed", "illegal memory access", (0,), 3)
    served = Served(lambda epoch, verdict, is_fresh: Revival(nxt, verdict))
    until(lambda: served.executor.ordered == [LARGEST])
    served.executor.fail(GangFailure("illegal memory access", verdict))
    until(lambda: len(nxt.ordered) == 1)
    assert nxt.ordered == [EIGHT]
    assert served.engine.snapshot().graphs.failed == {LARGEST: "the ranks ended while they captured it"}
    served.engine.close()
