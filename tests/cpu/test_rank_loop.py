"""A rank's loop: the next step is launched before the last one's ids are waited for, and answers keep their order."""

import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from actors.decisions.schedule.phase_clock import PhaseClock
from actors.remote.rank import Rank
from actors.tensors.runner import Sampled
from actors.words.messages import Bucket, Capture, Captured, Entry, Shutdown, StepBatch


def step(number):
    return StepBatch(0, number, 0, [], [], [Entry(0, number, [1], [], True)])


class SlowStep:
    """Ready once it was asked a few times; may not be taken before."""

    def __init__(self, number, looks):
        self.number, self.looks = number, looks

    def is_ready(self):
        self.looks -= 1
        return self.looks < 0

    def take(self):
        assert self.looks < 0, "the loop waited for a step that was not ready"
        return Sampled([[self.number]], [], [])


class Script:
    """A channel and a runner in one: messages come once so many answers were given; everything is written down."""

    def __init__(self, messages, looks):
        self.messages, self.looks, self.log, self.num_answers = deque(messages), looks, [], 0
        self.clock = PhaseClock()
        self.graphs = SimpleNamespace(release=lambda: self.ends.append("release graphs"))
        self.ends = []
        self.num_operations = 0

    def has_message(self):
        return self.messages[0][0] <= self.num_answers

    def receive(self):
        return self.messages.popleft()[1]

    def launch(self, message):
        self.log.append(("launch", message.step))
        return SlowStep(message.step, self.looks)

    def capture(self, bucket):
        self.log.append(("capture", bucket.num_tokens))
        self.num_operations += 7
        return "no room"

    def answer(self, result):
        self.num_answers += 1
        if isinstance(result, Captured):
            self.log.append(("captured", result.reason_not))
            return
        self.log.append(("answer", result.step))
        assert result.token_ids == [[result.step]]

    def close(self):
        self.ends.append("close")

    def report(self, error):
        self.ends.append("report")

    def abort(self):
        self.ends.append("abort")

    def part(self): ...


def serve(messages, looks, is_answering=True):
    script = Script(messages, looks)
    assert rank_of(script, is_answering).serve() is None
    return script.log


def rank_of(script, is_answering=True):
    rank = Rank.__new__(Rank)
    topology = SimpleNamespace(answering_rank=0 if is_answering else 1)
    rank.assignment = SimpleNamespace(rank=0, plan=SimpleNamespace(topology=topology))
    rank._runner = rank._channel = rank._groups = script
    rank._is_over, rank._enter_step = threading.Event(), lambda number: None
    rank._device, rank._num_uncounted = torch.device("cpu"), 0
    return rank


@pytest.mark.parametrize("looks", [0, 1, 7])
def test_a_step_that_is_here_is_launched_before_the_last_is_answered(looks):
    log = serve([(0, step(0)), (0, step(1)), (1, step(2)), (3, Shutdown(0))], looks)
    assert [entry for entry in log if entry[0] == "launch"] == [("launch", n) for n in range(3)]
    assert [entry for entry in log if entry[0] == "answer"] == [("answer", n) for n in range(3)]
    if looks > 1:
        assert log.index(("launch", 1)) < log.index(("answer", 0))


def test_a_step_alone_is_answered_without_another_message():
    assert serve([(0, step(0)), (1, Shutdown(0))], 20) == [("launch", 0), ("answer", 0)]


def test_what_is_ready_at_once_is_answered_at_once():
    log = serve([(0, step(0)), (0, step(1)), (2, Shutdown(0))], 0)
    assert log == [("launch", 0), ("answer", 0), ("launch", 1), ("answer", 1)]


def test_who_does_not_answer_waits_for_nothing():
    assert serve([(0, step(0)), (0, step(1)), (0, Shutdown(0))], 10**9, False) == [("launch", 0), ("launch", 1)]


@pytest.mark.parametrize("looks", [0, 7])
def test_a_capture_comes_after_the_answers_of_the_steps_before(looks):
    capture = Capture(0, Bucket(8, 8, 1, True))
    log = serve([(0, step(0)), (0, step(1)), (0, capture), (0, step(2)), (4, Shutdown(0))], looks)
    assert log.index(("capture", 8)) > log.index(("answer", 1)) > log.index(("launch", 1))
    assert log[log.index(("capture", 8)) :][:3] == [("capture", 8), ("captured", "no room"), ("launch", 2)]


def test_operations_of_a_capture_do_not_count():
    """Where it fails on one shard, the others began more of them; whoever is behind is held to be late."""
    script = Script([(0, Capture(0, Bucket(8, 8, 1, True))), (0, Shutdown(0))], 0)
    script.num_operations = 3
    rank = rank_of(script)
    rank.serve()
    assert script.num_operations == 10 and rank._num_operations() == 3


def test_graphs_are_given_up_before_the_groups_that_they_hold():
    """NCCL's abort and shutdown wait until no graph holds a group; so would the side thread, which is joined."""
    script = Script([(0, Shutdown(0))], 0)
    rank = rank_of(script)
    rank.serve()
    assert script.ends == ["release graphs", "close", "close"]  # the channel, and the groups
    script.ends.clear()
    rank.part(is_culprit=False)
    assert script.ends == ["release graphs", "close", "abort", "close"]

    failing = Script([(0, step(0))], 0)
    failing.launch = lambda message: 1 / 0
    assert "ZeroDivisionError" in rank_of(failing).serve()
    assert failing.ends == ["report", "release graphs", "abort", "release graphs", "close"]

    over = Script([(0, step(0))], 0)
    rank = rank_of(over)
    over.launch = lambda message: rank._is_over.set() or 1 / 0
    assert rank.serve() is None
    assert over.ends == ["release graphs", "close"]
