"""The engine with an executor that can be computed by hand: events, ends, failures."""

import threading
import time

import pytest

from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from actors.words.errors import EngineStopped, GangFailure
from actors.words.messages import Event, Request, SamplingParams
from tests.fakes.fake_executor import FakeExecutor, next_id

GREEDY = SamplingParams(0.0)


def settings(**changes):
    values = {"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_lanes": 2}
    return SchedulerSettings(**(values | changes))


class Listener:
    """Collects events; `end` waits for a request's last one."""

    def __init__(self):
        self.events: dict[str, list[Event]] = {}
        self._changed = threading.Condition()

    def __call__(self, events):
        with self._changed:
            for event in events:
                self.events.setdefault(event.request_id, []).append(event)
            self._changed.notify_all()

    def wait_for(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, timeout=20)

    def end(self, request_id):
        self.wait_for(lambda: request_id in self.events and self.events[request_id][-1].finish_reason)
        return self.events[request_id]

    def ids(self, request_id):
        return [token for event in self.events.get(request_id, []) for token in event.token_ids]


@pytest.fixture
def make_engine():
    engines = []

    def make(executor=None, num_blocks=64, **changes):
        listener = Listener()
        engine = Engine(executor or FakeExecutor(), settings(**changes), num_blocks, listener)
        engine.start()
        engines.append(engine)
        return engine, listener

    yield make
    for engine in engines:
        engine.close()


def expected(prompt, count, seed=0):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_id(ids, 1000, seed))
    return ids[len(prompt) :]


def test_ids_are_those_computed_by_hand(make_engine):
    engine, listener = make_engine()
    engine.add(Request("a", [1, 2, 3], 4, GREEDY))
    assert [event.finish_reason for event in listener.end("a")] == [None, None, None, "length"]
    assert listener.ids("a") == [9, 19, 39, 79]  # 1+2+3 and 3 ids; then 15 and 4; then 34 and 5; then 73 and 6
    assert listener.ids("a") == expected([1, 2, 3], 4)


def test_many_at_once_equal_each_alone(make_engine):
    engine, listener = make_engine()
    prompts = {f"r{i}": list(range(i, i * 3 + 1)) for i in range(40)}
    for name, prompt in prompts.items():
        engine.add(Request(name, prompt, 20, GREEDY))
    for name, prompt in prompts.items():
        listener.end(name)
        assert listener.ids(name) == expected(prompt, 20)
    assert engine.snapshot().blocks_used == 0


def test_a_stop_id_ends_and_is_the_last_id(make_engine):
    engine, listener = make_engine()
    engine.add(Request("a", [1, 2, 3], 10, GREEDY, frozenset([39])))
    assert listener.end("a")[-1].finish_reason == "stop"
    assert listener.ids("a") == [9, 19, 39]


def test_finish_ends_a_running_request_once(make_engine):
    executor = FakeExecutor(is_manual=True)
    engine, listener = make_engine(executor)
    engine.add(Request("a", [1], 100, GREEDY))
    engine.add(Request("b", [1], 2, GREEDY))
    while len(listener.ids("a")) < 3:
        executor.release()
        time.sleep(0.001)
    engine.finish("a")
    engine.finish("a")
    engine.finish("never seen")
    assert listener.end("a")[-1].finish_reason == "abort"
    executor.is_manual = False
    executor.release(1000)
    listener.end("b")
    listener.wait_for(lambda: engine.snapshot().blocks_used == 0)
    assert [event.finish_reason for event in listener.events["a"]].count("abort") == 1
    assert engine.snapshot().running == engine.snapshot().waiting == 0


def test_rows_are_dropped_when_idle(make_engine):
    executor = FakeExecutor()
    engine, listener = make_engine(executor)
    engine.add(Request("a", [1], 3, GREEDY))
    listener.end("a")
    deadline = time.monotonic() + 10
    while executor.open_rows and time.monotonic() < deadline:
        time.sleep(0.01)
    assert executor.open_rows == []


def test_a_request_without_seed_gets_one(make_engine):
    executor = FakeExecutor()
    engine, listener = make_engine(executor)
    engine.add(Request("a", [1], 3, SamplingParams(1.0)))
    engine.add(Request("b", [1], 3, SamplingParams(1.0, 17)))
    listener.end("a"), listener.end("b")
    sampling = [opened.sampling for step in executor.steps for opened in step.opened]
    assert sampling[0].seed is not None and sampling[1].seed == 17
    assert listener.ids("b") == expected([1], 3, seed=17)


def test_what_can_never_run_is_refused_and_harms_nobody(make_engine):
    engine, listener = make_engine(num_blocks=2)
    engine.add(Request("a", [1], 3, GREEDY))
    engine.add(Request("long", [1] * 30, 3, GREEDY))
    (event,) = listener.end("long")
    assert event.finish_reason == "error" and "need 3 KV blocks, the cache has 2" in event.error
    assert listener.end("a")[-1].finish_reason == "length"


def test_a_failed_gang_ends_every_request_with_an_error(make_engine):
    executor = FakeExecutor(is_manual=True)
    engine, listener = make_engine(executor)
    for name in "abc":
        engine.add(Request(name, [1], 50, GREEDY))
    executor.release()
    executor.fail(GangFailure("rank 1 died"))
    for name in "abc":
        last = listener.end(name)[-1]
        assert (last.finish_reason, last.error) == ("error", "rank 1 died")
    assert engine.snapshot().state == "failed"
    with pytest.raises(EngineStopped, match="rank 1 died"):
        engine.add(Request("d", [1], 5, GREEDY))


def test_close_ends_every_request(make_engine):
    executor = FakeExecutor(is_manual=True)
    engine, listener = make_engine(executor)
    engine.add(Request("a", [1], 50, GREEDY))
    engine.close()
    assert listener.end("a")[-1].finish_reason == "error"
    assert executor.is_closed
    with pytest.raises(EngineStopped):
        engine.add(Request("b", [1], 5, GREEDY))


@pytest.mark.parametrize(
    ("stop_ids", "set_fields", "named"),
    [
        ([], {}, "ignore_eos"),
        ([7], {"min_tokens": 2}, "min_tokens"),
        ([7], {"allowed_ids": [1]}, "allowed_token_ids"),
        ([7], {"bad_words": [[1]]}, "bad_words"),
    ],
)
def test_what_contradicts_a_grammar_is_refused(make_engine, stop_ids, set_fields, named):
    engine, listener = make_engine()
    engine.add(Request("a", [1], 5, SamplingParams(0.0, grammar="start: /a+/", **set_fields), frozenset(stop_ids)))
    assert named in listener.end("a")[-1].error


GRAMMAR = SamplingParams(0.0, grammar="start: /a+/")
END = frozenset([999])


@pytest.mark.parametrize(("depth", "num_lanes"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("prompt", [[5], list(range(40))])
def test_a_sample_that_waits_for_its_grammar_is_drawn_again(make_engine, depth, num_lanes, prompt):
    executor = FakeExecutor()
    executor.grammars_are_late = 3
    engine, listener = make_engine(executor, depth=depth, num_lanes=num_lanes)
    engine.add(Request("late", prompt, 9, GRAMMAR, END))
    engine.add(Request("other", [7, 8], 9, GREEDY))
    for name, ids in (("late", prompt), ("other", [7, 8])):
        assert listener.end(name)[-1].finish_reason == "length"
        assert listener.ids(name) == expected(ids, 9)


def test_sequences_that_wait_for_grammars_are_preempted_like_others(make_engine):
    executor = FakeExecutor()
    executor.grammars_are_late = 2
    engine, listener = make_engine(executor, num_blocks=5, depth=2)
    prompts = [[number] * 20 for number in range(4)]
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, 40, GRAMMAR, END))
    for number, prompt in enumerate(prompts):
        assert listener.end(str(number))[-1].finish_reason == "length"
        assert listener.ids(str(number)) == expected(prompt, 40)
    assert engine.stats.num_preemptions > 0


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(make_engine):
    executor = FakeExecutor()
    executor.failing_grammar = "start: /a+/"
    engine, listener = make_engine(executor, depth=2)
    engine.add(Request("bad", [1, 2], 5, GRAMMAR, END))
    engine.add(Request("good", [3, 4], 5, GREEDY))
    assert listener.end("bad")[-1].code == "grammar_error"
    assert listener.ids("bad") == []
    assert listener.end("good")[-1].finish_reason == "length"
    assert executor.num_checks == 0


def test_a_prompt_is_shared_after_its_grammar_failed(make_engine):
    """What its blocks hold is right."""
    executor = FakeExecutor()
    executor.failing_grammar = "start: /a+/"
    engine, listener = make_engine(executor)
    prompt = list(range(40))
    engine.add(Request("bad", prompt, 5, GRAMMAR, END))
    assert listener.end("bad")[-1].code == "grammar_error"
    engine.add(Request("alike", prompt, 5, GREEDY))
    assert listener.end("alike")[-1].num_cached > 0
