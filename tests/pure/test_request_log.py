"""The request log: one line of JSON for each request, and the request's id in all its log lines."""

import asyncio
import json
import logging

import pytest

from configs.monitoring import MonitoringConfig
from deployments.api.request_log import ACCESS, PROBES, RequestIdFilter, current_request, is_sane_id
from deployments.edge import Edge

COMPLETION = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture
def lines(caplog):
    """What was written so far, a dict a line; the list grows."""
    caplog.set_level(logging.INFO, ACCESS.name)
    return lambda: [json.loads(record.message) for record in caplog.records if record.name == ACCESS.name]


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_has_a_line_with_counts_and_times_and_no_text(world, lines, stream):
    sent = {**COMPLETION, "prompt": list(range(10, 60)), "n": 2, "stream": stream}
    for _ in range(2):
        assert world.post(COMPLETIONS, sent, headers={**JSON, "x-request-id": "mine-1"}).status_code == 200
        world.wait_until_idle()
    first, second = lines()
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, 48)  # its first answer's, not those of both
    for line in (first, second):
        assert line["request_id"] == "mine-1"
        assert (line["method"], line["path"], line["status"], line["model"]) == ("POST", COMPLETIONS, 200, "tiny")
        assert (line["prompt_tokens"], line["completion_tokens"]) == (50, 12)
        assert line["finish_reasons"] == ["length", "length"]
        assert 0 < line["ttft_s"] < line["total_s"]
        assert not {"error", "key", "reasoning_tokens"} & set(line)


def test_no_text_of_clients_is_in_a_line(world, lines):
    world.post(COMPLETIONS, COMPLETION)
    world.post(COMPLETIONS, {**COMPLETION, "model": "a secret prompt"})
    world.post(COMPLETIONS, raw=b'{"prompt": "a secret prompt", "modl": 1}')
    world.post(COMPLETIONS, COMPLETION, headers={**JSON, "authorization": "Bearer a secret prompt"})
    assert len(lines()) == 4 and not any("secret" in str(line) for line in lines())


def test_errors_are_named_by_their_codes(world, lines):
    world.post(COMPLETIONS, {**COMPLETION, "model": "other"})
    world.post(COMPLETIONS, {**COMPLETION, "max_tokens": "many"})
    world.service.is_draining = True
    world.post(COMPLETIONS, COMPLETION)
    world.get("/nothing")
    found = [(line["status"], line.get("error")) for line in lines()]
    assert found == [
        (404, "model_not_found"),
        (400, "invalid_request_error"),
        (503, "server_draining"),
        (404, "invalid_request_error"),
    ]


@pytest.mark.parametrize(
    ("asked", "logged"), [("requests", {"/v1/models"}), ("all", {"/v1/models", *PROBES}), ("none", set())]
)
def test_probes_are_left_out_unless_asked_for(make_world, lines, asked, logged):
    world = make_world(monitoring=MonitoringConfig(access_log=asked))
    for path in ("/v1/models", *PROBES):
        assert world.get(path).status_code == 200
    assert {line["path"] for line in lines()} == logged
    assert len(lines()) == len(logged)


def test_a_client_that_leaves_is_logged_as_one(make_world, scripted_executor, lines):
    executor = scripted_executor(vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    body = json.dumps({**COMPLETION, "max_tokens": 60, "stream": True}).encode()

    async def go(waits_for_text):
        """A client that leaves, before or after its first text."""
        sent, arrived = [], [{"type": "http.request", "body": body}]

        async def receive():
            if arrived:
                return arrived.pop()
            while waits_for_text and len(sent) < 2:
                executor.release(1)
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": headers}
        await world.app(scope, receive, send)

    asyncio.run(go(waits_for_text=False))
    asyncio.run(go(waits_for_text=True))
    executor.release(100)
    world.wait_until_idle()
    before, during = lines()
    assert (before["status"], before["error"], before["completion_tokens"]) == (499, "client_left", 0)
    assert (during["status"], during["error"]) == (200, "client_left")
    assert 1 <= during["completion_tokens"] < 60
    assert during["finish_reasons"] == [None]


def test_ids_that_do_not_fit_a_log_are_replaced(world, lines):
    for given in ("x" * 129, "two words", "{json}", "", "\u00fc"):
        world.post(COMPLETIONS, COMPLETION, headers={**JSON, "x-request-id": given.encode("utf-8")})
    ids = [line["request_id"] for line in lines()]
    assert len(set(ids)) == 5 and all(len(one) == 32 for one in ids)
    assert is_sane_id("req_01:a/b+c=d@e.f-g") and is_sane_id("x" * 128)


def test_sequences_of_one_request_begin_with_its_id_and_differ_where_clients_use_an_id_twice(world):
    async def go():
        async with world.http() as client:
            headers = {"x-request-id": "twice"}
            await asyncio.gather(
                *(client.post(COMPLETIONS, json={**COMPLETION, "n": 2}, headers=headers) for _ in range(4))
            )

    added = []
    add, world.engine.add = world.engine.add, lambda request: (added.append(request.request_id), add(request))
    asyncio.run(go())
    assert len(set(added)) == 8 and all(one.startswith("twice.") for one in added)


def test_log_lines_of_a_request_begin_with_its_id(world, monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.request)
    handler.addFilter(RequestIdFilter())
    logger = logging.getLogger("deployments.api.errors")
    logger.addHandler(handler)
    monkeypatch.setattr(type(world.service.text), "encode", lambda *_, **__: 1 / 0)
    try:
        assert world.post(COMPLETIONS, COMPLETION, headers={**JSON, "x-request-id": "odd-one"}).status_code == 500
        logger.error("outside of any request")
    finally:
        logger.removeHandler(handler)
    assert said == ["[odd-one] ", ""]
    assert current_request() is None


@pytest.mark.parametrize(("value", "passes"), [(b"fine-1", True), (b"a b", False), (b"y" * 200, False)])
def test_the_edge_lets_sane_ids_pass(value, passes):
    seen = []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])

    asyncio.run(Edge(app)({"headers": [(b"x-request-id", value)]}, None, None))
    assert bool(seen) is passes
