"""Deadlines and signs of life: what is late ends in the engine; while a gang recovers, streams say that they live."""

import asyncio
import contextlib
import json
import threading
import time

import pytest

from actors.decisions.schedule.deadlines import Deadlines
from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from actors.words.messages import Request, SamplingParams
from deployments.api import connection, generation
from tests.fakes.fake_executor import FakeExecutor
from tests.serving import until_true

STREAM = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 100, "temperature": 0, "stream": True, "ignore_eos": True}
PLAIN = {**STREAM, "stream": False}
COMPLETIONS = "/v1/completions"


class Client:
    """One ASGI exchange that stays until the app ends it; the body comes as it is given, and may stay incomplete."""

    def __init__(self, app, body, is_whole=True):
        self.messages, self.body = [], b""
        self._incoming = [{"type": "http.request", "body": body, "more_body": not is_whole}]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}
        self.can_send = asyncio.Event()
        self.can_send.set()
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._incoming:
            return self._incoming.pop()
        return await asyncio.Event().wait()

    async def _send(self, message):
        await self.can_send.wait()
        self.messages.append(message)
        self.body += message.get("body", b"")

    @property
    def status(self):
        return self.messages[0]["status"]


def ask(app, body):
    return Client(app, json.dumps(body).encode())


def test_deadlines_are_named_once_and_in_order():
    deadlines = Deadlines()
    assert deadlines.seconds_left(0.0) is None
    for name, deadline in (("late", 9.0), ("soon", 2.0), ("now", 1.0)):
        deadlines.add(name, deadline)
    assert deadlines.seconds_left(0.5) == 0.5
    assert deadlines.take_expired(0.9) == []
    assert deadlines.take_expired(2.0) == ["now", "soon"]
    assert deadlines.take_expired(2.0) == []
    assert deadlines.seconds_left(10.0) == 0.0


@pytest.mark.parametrize("num_running", [1, 0])
def test_the_engine_ends_what_is_late_and_computes_none_of_it(num_running):
    """Waiting on an executor that says nothing: only the deadline itself can wake it."""
    events, woken = [], threading.Event()
    executor = FakeExecutor(is_manual=True)
    settings = SchedulerSettings(16, num_running or 1, 64, 1)
    engine = Engine(executor, settings, 64, lambda e: (events.extend(e), woken.set()))
    engine.start()
    if not num_running:
        engine.add(Request("first", [1, 2, 3], 50, SamplingParams(0.0)))
    engine.add(Request("late", [1, 2, 3], 50, SamplingParams(0.0), deadline=time.monotonic() + 0.1))
    assert woken.wait(20)
    assert [(event.request_id, event.finish_reason) for event in events] == [("late", "timeout")]
    assert engine.stats.num_finished["timeout"] == 1
    engine.finish("late")  # no second end
    submitted = len(executor.steps)
    executor.release(100)
    engine.add(Request("next", [1], 1, SamplingParams(0.0)))
    while not any(event.request_id == "next" and event.finish_reason for event in events):
        executor.release()
        time.sleep(0.001)
    after = {entry.seq for step in executor.steps[submitted:] for entry in step.entries}
    assert [event.finish_reason for event in events if event.request_id == "late"] == ["timeout"]
    late_seq = 1 - num_running
    assert late_seq not in after
    if not num_running:
        assert late_seq not in {entry.seq for step in executor.steps for entry in step.entries}  # never prefilled
    engine.close()


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("body", [STREAM, PLAIN])
def test_a_late_request_is_told_so_and_frees_its_blocks(make_world, scripted_executor, body, num_tokens):
    executor = scripted_executor([40] * 100, vocab_size=400, is_manual=True)
    world = make_world(executor=executor)

    async def go():
        client = ask(world.app, {**body, "timeout": 0.4, "n": 2})
        for _ in range(num_tokens):
            await until_true(executor.release)
        await client.task
        if client.status == 200:
            assert num_tokens and body["stream"]
            *_, last = client.body.strip().split(b"\n\n")
            assert b"[DONE]" not in client.body
            error = json.loads(last.removeprefix(b"data: "))["error"]
        else:
            assert client.status == 504
            assert (b"x-should-retry", b"false") in client.messages[0]["headers"]
            error = json.loads(client.body)["error"]
        assert (error["code"], error["type"]) == ("timeout", "server_error")

    asyncio.run(go())
    executor.release(100)
    world.wait_until_idle()
    assert world.engine.stats.num_finished["timeout"] == 2


def test_the_limit_holds_without_asking_and_cannot_be_raised(make_world, scripted_executor, error_of):
    world = make_world(executor=scripted_executor(is_manual=True, vocab_size=400), request_s=0.2)
    error_of(world.post(COMPLETIONS, PLAIN), 504)
    assert error_of(world.post(COMPLETIONS, {**PLAIN, "timeout": 0.3}), 400)["param"] == "timeout"
    for wrong in (0, -1, "1", True, [1]):
        assert error_of(world.post(COMPLETIONS, {**PLAIN, "timeout": wrong}), 400)["param"] == "timeout"
    world.wait_until_idle()


def test_in_time_is_in_time(world):
    assert world.post(COMPLETIONS, {**PLAIN, "timeout": 60, "max_tokens": 3}).status_code == 200


def test_a_late_prompt_never_reaches_the_engine(make_world, error_of, monkeypatch):
    world = make_world()

    async def slow_encode(prompts, add_special_tokens):
        await asyncio.sleep(60)

    monkeypatch.setattr(world.text, "encode", slow_encode)
    error_of(world.post(COMPLETIONS, {**PLAIN, "timeout": 0.05}), 504)
    assert world.executor.steps == []
    assert world.service.admission.num_admitted == 0


def test_a_body_that_does_not_come_is_not_waited_for(world, monkeypatch):
    monkeypatch.setattr(connection, "BODY_S", 0.05)

    async def go():
        client = Client(world.app, b'{"model": ', is_whole=False)
        await client.task
        assert client.status == 408
        assert "body" in json.loads(client.body)["error"]["message"]

    asyncio.run(go())


def test_a_client_that_never_reads_does_not_hold_its_place_for_ever(make_world, monkeypatch):
    monkeypatch.setattr(connection, "GRACE_S", 0.05)
    world = make_world(max_requests=1)

    async def go():
        client = ask(world.app, {**STREAM, "timeout": 0.2})
        client.can_send.clear()
        await client.task
        assert client.messages == []
        assert world.service.admission.num_admitted == 0

    asyncio.run(go())
    world.wait_until_idle()


@contextlib.contextmanager
def recovering(world):
    """As while a gang comes back: the engine's thread is busy, takes nothing, and says so before and after."""
    world.engine._state = "recovering"
    world.engine._deliver([])
    yield
    world.engine._state = "ready"
    world.engine._deliver([])


@pytest.fixture
def quick_pings(monkeypatch):
    monkeypatch.setattr(generation, "PING_S", 0.02)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_streams_ping_while_the_gang_recovers_and_go_on(make_world, scripted_executor, quick_pings, num_tokens):
    script = list(range(40, 50))
    executor = scripted_executor(script, vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    plain = make_world(script=script).post(COMPLETIONS, {**PLAIN, "max_tokens": 10}).json()

    async def go():
        client = ask(world.app, {**STREAM, "max_tokens": 10})
        for _ in range(num_tokens):
            await until_true(executor.release)
        await until_true(lambda: client.body.count(b"data: ") == num_tokens)
        await until_true(lambda: executor._done)
        with recovering(world):
            await until_true(lambda: client.body.count(b": ping\n\n") >= 3)
            num_pings = client.body.count(b": ping\n\n")
        await until_true(lambda: executor.release() == 0 and client.task.done())
        blocks = client.body.split(b"\n\n")
        assert blocks.pop() == b""
        assert blocks.pop() == b"data: [DONE]"
        assert blocks[:num_tokens] == [block for block in blocks[:num_tokens] if block.startswith(b"data: ")]
        assert num_pings <= blocks.count(b": ping") <= num_pings + 1  # none once it goes on
        told = [json.loads(block[6:])["choices"][0]["text"] for block in blocks if block != b": ping"]
        assert "".join(told) == plain["choices"][0]["text"]

    asyncio.run(go())


def test_plain_requests_wait_in_silence(make_world, scripted_executor, quick_pings):
    executor = scripted_executor(list(range(40, 50)), vocab_size=400, is_manual=True)
    world = make_world(executor=executor)

    async def go():
        client = ask(world.app, {**PLAIN, "max_tokens": 2})
        await until_true(lambda: executor._done)
        with recovering(world):
            await asyncio.sleep(0.2)
            assert client.messages == []
        await until_true(lambda: executor.release() == 0 and client.task.done())
        assert client.status == 200
        assert json.loads(client.body)["usage"]["completion_tokens"] == 2

    asyncio.run(go())


@pytest.mark.parametrize("body", [STREAM, PLAIN])
def test_a_deadline_holds_while_the_gang_recovers(make_world, scripted_executor, quick_pings, body):
    executor = scripted_executor(vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    world.engine._deadlines.take_expired = lambda now: []  # its thread is busy

    async def go():
        client = ask(world.app, {**body, "timeout": 0.3})
        await until_true(lambda: executor._done)
        with recovering(world):
            await client.task
        if body["stream"]:
            assert client.status == 200  # told by the first ping
            assert b": ping\n\n" in client.body
            assert json.loads(client.body.split(b"data: ")[-1])["error"]["code"] == "timeout"
        else:
            assert client.status == 504

    asyncio.run(go())
    assert world.service.admission.num_admitted == 0


def test_ready_and_cluster_say_that_the_gang_recovers(world, error_of):
    with recovering(world):
        response = world.get("/ready")
        error_of(response, 503)
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert world.get("/health").status_code == 200
        assert world.get("/cluster").json()["state"] == "recovering"
    assert world.get("/ready").status_code == 200


def test_a_draining_replica_finishes_what_runs_and_takes_nothing_more(make_world, scripted_executor, error_of):
    script = list(range(40, 60))
    executor = scripted_executor(script, vocab_size=400, is_manual=True)
    world = make_world(executor=executor)

    async def go():
        clients = [ask(world.app, {**body, "max_tokens": 20}) for body in (STREAM, PLAIN)]
        await until_true(executor.release)
        world.service.is_draining = True
        refused = ask(world.app, PLAIN)
        await refused.task
        assert refused.status == 503
        assert 1 <= int(dict(refused.messages[0]["headers"])[b"retry-after"]) <= 60
        assert json.loads(refused.body)["error"]["code"] == "server_draining"
        await until_true(lambda: executor.release() == 0 and all(client.task.done() for client in clients))
        assert clients[0].body.endswith(b"data: [DONE]\n\n")
        assert json.loads(clients[1].body)["usage"]["completion_tokens"] == 20

    asyncio.run(go())
    response = world.get("/ready")
    assert error_of(response, 503)["code"] == "server_draining"
    assert "retry-after" in response.headers
    assert world.get("/health").status_code == 200
    assert world.get("/cluster").json()["state"] == "draining"
