"""Draining decided, and the edge that keeps Serve from being commanded by clients."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest

from deployments import edge
from deployments.edge import Edge, middlewares
from deployments.serve import drain as module
from deployments.serve.drain import Drain, leaving_node

NOW, DRAIN_S = 1000.0, 30.0


@pytest.mark.parametrize(
    ("draining", "expected"),
    [
        ({}, None),
        ({"elsewhere": 0}, None),
        ({"second": 0}, "second"),
        ({"second": 5000.0}, "second"),  # whenever it goes: nobody else moves the stage
        ({"own": 0}, None),  # Serve starts another replica first
        ({"own": 5000.0}, None),
        ({"own": NOW + DRAIN_S}, "own"),
        ({"own": NOW - 1}, "own"),
        ({"own": 5000.0, "second": 0}, "second"),
    ],
)
def test_which_node_a_replica_drains_for(draining, expected):
    assert leaving_node("own", {"own", "second", "third"}, draining, NOW, DRAIN_S) == expected


def test_a_gang_on_one_node_waits_for_serve():
    assert leaving_node("own", {"own"}, {"own": 0}, NOW, DRAIN_S) is None


def test_finishing_waits_for_what_runs(world):
    gave_up = []
    drain = Drain(world.service, 60.0, lambda: gave_up.append(1))

    async def go():
        with world.service.admission.reserve(2):
            ending = asyncio.ensure_future(drain.finish())
            await asyncio.sleep(0.05)
            assert world.service.is_draining and not ending.done()
        await ending

    asyncio.run(go())
    assert not gave_up


@pytest.mark.parametrize("why", ["told to stop", "a node leaves"])
def test_what_takes_longer_than_allowed_ends_with_an_error(make_world, scripted_executor, error_of, monkeypatch, why):
    monkeypatch.setattr(module, "WATCH_S", 0.01)
    world = make_world(executor=scripted_executor(is_manual=True, vocab_size=400))
    drain = Drain(world.service, 0.2, world.service.engine.close)

    async def go():
        async with world.http() as client:
            body = json.dumps({"model": "tiny", "prompt": [5, 6], "max_tokens": 50})
            headers = {"content-type": "application/json"}
            asked = asyncio.ensure_future(client.post("/v1/completions", content=body, headers=headers))
            while not world.service.admission.num_admitted:
                await asyncio.sleep(0)
            if why == "told to stop":
                await drain.finish()
            else:
                drain.watch(lambda: "second")
            return await asked

    response = asyncio.run(go())
    error_of(response, 503)
    assert "retry-after" in response.headers
    assert world.service.admission.num_admitted == 0


def test_a_node_that_leaves_ends_no_idle_engine(world, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 0.01)
    gave_up = []
    drain = Drain(world.service, 0.05, lambda: gave_up.append(1))
    before = set(threading.enumerate())
    drain.watch(lambda: "second")
    (thread,) = set(threading.enumerate()) - before
    thread.join(20)
    assert not thread.is_alive() and not gave_up and drain.reason


def test_a_leaving_node_ends_readiness_and_health_though_looking_failed_before(world, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 0.01)
    answers = iter([None, ConnectionError("no head"), "second"])
    seen = threading.Event()

    def look():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        seen.set()
        return answer

    drain = Drain(world.service, 1.0, lambda: None)
    assert (drain.reason, world.service.is_ready) == ("", True)
    drain.watch(look)
    while not drain.reason:
        assert seen.wait(20)
    assert "second" in drain.reason
    while world.service.is_ready:
        seen.wait(0.001)
    app = pytest.importorskip("deployments.app")
    replica = SimpleNamespace(_replica=SimpleNamespace(check_health=lambda: None), _drain=drain)
    with pytest.raises(RuntimeError, match="second"):
        app.LLMReplica.func_or_class.check_health(replica)


HEADERS = [
    (b"content-type", b"application/json"),
    (b"x-request-id", b"one"),
    (b"x-title", "ñ".encode()),
]
COMMANDS = [
    (b"x-request-disconnect-disabled", b"?1"),
    (b"X-Request-Timeout-Seconds", b"0"),
    (b"serve_multiplexed_model_id", b"a"),
    (b"serve-multiplexed-model-id", b"b"),
    (b"x-request-id", b"\xff"),
    (b"x-session-id", b"\xc3"),
    (b"x-\xff", b"a"),
]


def test_the_edge_takes_out_commands_and_what_serve_cannot_read():
    (middleware,) = middlewares()
    assert middleware.cls is Edge
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    scope = {"type": "http", "headers": [*COMMANDS, *HEADERS, *COMMANDS]}
    asyncio.run(Edge(app)(scope, None, None))
    asyncio.run(Edge(app)({"type": "lifespan"}, None, None))
    assert [entry.get("headers") for entry in seen] == [HEADERS, None]


def test_serve_still_has_the_names_that_the_edge_takes_out():
    constants = pytest.importorskip("ray.serve._private.constants")
    names = {
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_MULTIPLEXED_MODEL_ID,
    }
    assert {name.lower().replace("_", "-").encode() for name in names} == edge.COMMANDS
