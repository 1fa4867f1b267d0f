"""API keys: no route is open without one, files are read again, limits and usage are each key's own; CORS; headers."""

import asyncio
import hashlib
import json
import re
import statistics
import threading
import time
from pathlib import Path
from unittest import mock

import openai
import pytest
from starlette.routing import Route

from configs.config import Config
from configs.keys import KeyLimits, parse_keys
from deployments.api import door, key_ring
from deployments.api.door import MAX_HEADER_BYTES, OPEN, Bodies
from deployments.api.errors import ApiError
from deployments.api.key_limits import KeyAccount
from deployments.api.key_ring import KeyRing
from deployments.api.request_log import ACCESS

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
KEYS = f"""
alice: {ALICE}
bob:
  sha256: "{hashlib.sha256(BOB.encode()).hexdigest()}"
  requests_per_minute: 3
  max_concurrent: 2
"""
BODY = {"model": "tiny", "prompt": "one two", "max_tokens": 3, "temperature": 0}


def bearer(key):
    return {"content-type": "application/json", "authorization": f"Bearer {key}"}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(KEYS)
    return path


@pytest.fixture
def ring(path, monkeypatch):
    monkeypatch.setattr(key_ring, "LOOK_EVERY_S", 0.0)
    return KeyRing(f"file:{path}")


@pytest.fixture
def guarded(make_world, ring):
    return make_world(ring=ring)


def test_no_route_is_open_but_what_probes_ask(guarded, error_of):
    routes = [route for route in guarded.app.routes if isinstance(route, Route)]
    assert len(routes) >= 11
    for route in routes:
        path = route.path.replace("{model:path}", "tiny")
        for method in sorted(route.methods or {"GET", "POST"}):
            for headers in ({}, bearer("sk-alice-012345678"), {"x-api-key": ""}, {"authorization": f"Basic {ALICE}"}):
                answer = guarded.get(path, method, headers)
                if route.path in OPEN:
                    assert answer.status_code != 401
                    continue
                assert answer.status_code == 401, f"{method} {path}"
                assert answer.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert error_of(answer, 401)["code"] == "invalid_api_key"
    for path in ("/v1", "/nowhere", "/health/", "/health/../v1/models", "/HEALTH", "/metrics/x"):
        assert guarded.get(path).status_code == 401
    assert {"/health", "/ready", "/version", "/metrics", "/metrics/replica"} == OPEN


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {ALICE}"},
        {"authorization": f"bearer   {ALICE}"},
        {"x-api-key": BOB},
        {"authorization": "Basic of-a-gateway", "x-api-key": ALICE},
    ],
)
def test_a_key_opens_in_either_header(guarded, headers):
    answer = guarded.post("/v1/completions", BODY, headers={"content-type": "application/json", **headers})
    assert answer.status_code == 200, answer.text


def test_openais_client_says_what_is_wrong(guarded):
    with guarded.serve() as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-nobody-0123", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
        assert raised.value.code == "invalid_api_key"
        assert client.with_options(api_key=ALICE).models.list().data[0].id == "tiny"


def test_keys_are_rotated_while_serving(guarded, path, caplog):
    def status(key):
        return guarded.get("/v1/models", headers=bearer(key)).status_code

    assert [status(ALICE), status(BOB)] == [200, 200]
    path.write_text("alice: sk-alice-of-tomorrow\n")
    assert [status(ALICE), status(BOB), status("sk-alice-of-tomorrow")] == [401, 401, 200]
    for broken in ("alice: x\n", "- a list\n", "alice: [\n", ""):
        path.write_text(broken)
        assert [status(ALICE), status("sk-alice-of-tomorrow")] == [401, 200]
    path.unlink()
    assert status("sk-alice-of-tomorrow") == 200
    replaced = path.with_suffix(".new")
    replaced.write_text(KEYS)
    replaced.replace(path)  # as a mounted secret is
    assert [status(ALICE), status("sk-alice-of-tomorrow")] == [200, 401]
    assert "the keys stay as they were" in caplog.text
    assert "sk-alice-of" not in caplog.text


def test_keys_may_come_from_the_environment():
    ring = KeyRing("env:KEYS", {"KEYS": KEYS})
    assert ring.find(BOB).name == "bob"
    with pytest.raises(ValueError, match=r"api\.keys: env:KEYS: the variable is not set"):
        KeyRing("env:KEYS", {})
    with pytest.raises(ValueError, match=r"api\.keys: file:/nowhere: cannot be read"):
        KeyRing("file:/nowhere")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "should be a mapping"),
        ("alice: [sk-secret-1234", "line 1: this is not the YAML"),
        ("alice: sk-secret-1234\nalice: sk-secret-5678", "a name stands twice"),
        ("alice: secret", "line 1: `key` should be 8 to 512"),
        ("alice: sk secret 1234", "line 1: `key` should be 8 to 512"),
        ("# x\nsk-secret-1234: bob", "line 2: the name looks like a key"),
        ("sk-secret-1234: alice-team", "line 1: the name looks like a key"),
        ("secretSECRETsecret0123456789: alice-team", "line 1: the name looks like a key"),
        ("my-secret: bob", "line 1: `key` should be 8 to 512"),
        ("alice: 2024-99-99", "line 1: `key` should be 8 to 512"),
        ("alice: !!timestamp secret", "line 1: `key` should be 8 to 512"),
        ("alice: " + "[" * 600 + "]" * 600, "nested too deeply"),
        ("alice: {key: sk-secret-1234, sk-secret: 3}", "line 1: a field is unknown; known here: key"),
        ("alice: {key: sk-secret-1234, 5: 3}", "line 1: a field is unknown; known here: key"),
        ("alice: 12345678", "in quotes if it is a number"),
        ("a b: sk-secret-1234", "a name should be"),
        ("alice: {sha256: sk-secret-1234}", "line 1: `sha256` should be 64 hexadecimal digits"),
        ("alice: {key: sk-secret-1234, sha256: aa}", "line 1: needs either"),
        ("alice: {requests_per_minute: 3}", "line 1: needs either"),
        ("alice: {key: sk-secret-1234, tokens_per_minute: 0}", "line 1: `tokens_per_minute`: Input should be greater"),
        ("alice: sk-secret-1234\nbob: sk-secret-1234", "bob: has the same key as alice"),
        ("\n".join(f"k{number}: sk-secret-{number:08}" for number in range(1001)), "has 1001 keys"),
    ],
)
def test_what_is_wrong_with_keys_is_said_without_them(text, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        parse_keys(text)
    assert "secret" not in str(raised.value)


def test_a_config_takes_places_of_keys_and_never_keys():
    base = {"model": {"source": "x"}}
    assert Config.model_validate({**base, "api": {"keys": "file:/run/keys"}}).api.keys == "file:/run/keys"
    with pytest.raises(ValueError, match="should be file:/PATH, from the root on"):
        Config.model_validate({**base, "api": {"keys": "file:keys.yaml"}})
    origins = ["https://Chat.Example.org:443", "http://x:80", "http://x:443", "*"]
    api = Config.model_validate({**base, "api": {"cors_origins": origins}}).api
    assert api.cors_origins == ("https://chat.example.org", "http://x", "http://x:443", "*"), "as browsers send them"
    for wrong in ("sk-secret-1234", "file:", "/run/keys"):
        with pytest.raises(ValueError, match="should be file:PATH or env:NAME"):
            Config.model_validate({**base, "api": {"keys": wrong}})
    for wrong in ("example.org", "https://example.org/", "https://example.org/chat"):
        with pytest.raises(ValueError, match="a scheme and a host without a path"):
            Config.model_validate({**base, "api": {"cors_origins": [wrong]}})


def test_wrong_keys_take_the_same_time_however_near_they_come():
    """Each is a sum over a hundred keys; medians of turns in which all kinds take part."""
    ring = KeyRing("env:KEYS", {"KEYS": "\n".join(f"k{number}: sk-{number:020}" for number in range(100))})
    first, last = f"sk-{0:020}", f"sk-{99:020}"
    kinds = [first, last, first[:-1] + "x", last[:-1] + "x", "x" * len(first), "x" * 8]
    seconds = {kind: [] for kind in kinds}
    for _ in range(200):
        for kind in kinds:
            began = time.perf_counter()
            ring.find(kind)
            seconds[kind].append(time.perf_counter() - began)
    medians = [statistics.median(seconds[kind]) for kind in kinds]
    assert max(medians) < 1.3 * min(medians), medians


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_limits_refuse_with_the_time_after_which_there_is_room():
    clock = Clock()
    account = KeyAccount("a", KeyLimits(requests_per_minute=3, tokens_per_minute=100, max_concurrent=2), clock)

    def refused():
        with pytest.raises(ApiError) as raised, account.request():
            pass
        assert (raised.value.status, raised.value.code) == (429, "rate_limit_exceeded")
        return raised.value.retry_after_s

    with account.request(), account.request():
        assert refused() == 1  # both run
        assert dict(account.headers())[b"x-ratelimit-remaining-requests"] == b"1"
    with account.request():
        pass
    assert refused() == 20  # three a minute are one in 20 s
    clock.now += 19.5
    assert refused() == 1
    clock.now += 1
    with account.request():
        account.spend(250)
    clock.now += 60
    assert refused() == 31  # of 250, 100 were there, 100 came back, and there has to be one
    clock.now += 31
    with account.request():
        pass
    assert (account.num_requests, account.num_refused) == (5, 4)
    assert dict(account.headers())[b"x-ratelimit-limit-tokens"] == b"100"
    assert set(dict(account.headers())) == {
        f"x-ratelimit-{kind}-{name}".encode()
        for kind in ("limit", "remaining", "reset")
        for name in ("requests", "tokens")
    }


def test_a_limited_key_is_told_so_and_others_go_on(guarded, error_of):
    def ask(key):
        return guarded.post("/v1/completions", BODY, headers=bearer(key))

    answers = [ask(BOB) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "2"
    error = error_of(answers[3], 429)
    assert error["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    assert answers[3].headers["x-ratelimit-limit-requests"] == "3"
    free = ask(ALICE)
    assert free.status_code == 200
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    assert guarded.get("/v1/models", headers=bearer(BOB)).status_code == 200, "reading costs nothing"
    page = guarded.get("/metrics").text
    for name, key, value in [
        ("requests", "alice", 1),
        ("requests", "bob", 3),
        ("refused", "bob", 1),
        ("prompt_tokens", "bob", 3 * len(guarded.ids("one two"))),
        ("generation_tokens", "bob", 9),
        ("generation_tokens", "alice", 3),
        ("cached_tokens", "alice", 0),
    ]:
        assert f'stagemesh_key_{name}_total{{key="{key}",model_name="tiny",replica="replica-1"}} {value}.0' in page


def test_tokens_of_a_key_are_counted_where_they_are_made(make_world, text, tmp_path):
    path, used = tmp_path / "keys", asyncio.run(text.encode(["one two"]))[0]
    path.write_text(f"alice: {{key: {ALICE}, tokens_per_minute: {2 * (len(used) + 3) - 1}}}")
    world = make_world(ring=KeyRing(f"file:{path}"))
    answers = [world.post("/v1/completions", BODY, headers=bearer(ALICE)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60


def test_browsers_are_told_of_the_pages_that_may_call(make_world, ring):
    world = make_world(ring=ring, cors_origins=("https://chat.example",))
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type,x-stainless-os"
    preflight = world.get("/v1/chat/completions", "OPTIONS", asked)
    assert preflight.status_code == 200, "browsers send no key here"
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    assert world.get("/v1/models", "OPTIONS", {**asked, "origin": "https://evil.example"}).status_code == 400
    answer = world.post("/v1/completions", BODY, headers={**bearer(ALICE), "origin": "https://chat.example"})
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert {"x-request-id", "retry-after"} <= set(answer.headers["access-control-expose-headers"].split(", "))
    refused = world.get("/v1/models", headers={"origin": "https://chat.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")


def test_without_cors_no_page_may_call(world):
    answer = world.get("/v1/models", headers={"origin": "https://chat.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_headers_have_a_limit(world, error_of):
    fits = {"x-long": "x" * (MAX_HEADER_BYTES - 1000)}
    assert world.get("/health", headers=fits).status_code == 200
    answer = world.get("/health", headers={"x-long": "x" * MAX_HEADER_BYTES})
    assert "at most 32768" in error_of(answer, 431)["message"]
    assert answer.headers["connection"] == "close"
    many = {f"x-{number}": "y" for number in range(5000)}
    assert world.get("/health", headers=many).status_code == 431


def test_a_look_at_the_file_is_shared(guarded, ring, monkeypatch):
    """A thousand requests at once look once."""
    looks = []
    monkeypatch.setattr(key_ring, "LOOK_EVERY_S", 5.0)
    monkeypatch.setattr(ring, "_looked_at", time.monotonic() - 6)
    monkeypatch.setattr(ring, "_look", looks.append)

    async def go():
        await asyncio.gather(*(ring.look() for _ in range(1000)))

    asyncio.run(go())
    assert len(looks) == 1


def test_a_file_system_that_hangs_holds_nobody_up_and_is_told_of_once(ring, path, monkeypatch, caplog):
    monkeypatch.setattr(key_ring, "WAIT_S", 0.05)
    goes_on, read = threading.Event(), ring._text
    monkeypatch.setattr(ring, "_text", lambda path: goes_on.wait(20) and read(path))
    path.write_text("alice: sk-alice-of-tomorrow\n")

    async def ask():
        await asyncio.gather(*(ring.look() for _ in range(100)))

    asyncio.run(ask())
    asyncio.run(ask())
    assert ring.find(ALICE) and "the file system may hang" in caplog.text
    assert caplog.text.count("the keys stay as they were") == 1
    goes_on.set()
    ring._looking.result(20)
    assert not ring.find(ALICE) and ring.find("sk-alice-of-tomorrow")


def test_a_file_that_could_not_be_read_is_read_when_it_can_be(ring, path, monkeypatch, caplog):
    path.write_text("alice: sk-alice-of-tomorrow\n")
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Path, "read_text", mock.Mock(side_effect=OSError(5, "Input/output error")))
        ring._look(path)
        ring._look(path)
    assert ring.find(ALICE) and caplog.text.count("Input/output error") == 1
    ring._look(path)
    assert ring.find("sk-alice-of-tomorrow"), "though the file has not changed since"


def test_all_bodies_together_have_a_limit_and_one_alone_has_none(monkeypatch):
    monkeypatch.setattr(door, "MAX_BODIES_BYTES", 10)
    bodies = Bodies()

    async def receive():
        return {"type": "http.request", "body": b"x" * 8}

    async def go():
        with bodies.counted(receive) as alone:
            await alone()
            await alone()
            with pytest.raises(ApiError) as raised, bodies.counted(receive) as other:
                await other()
            assert (raised.value.status, raised.value.code) == (503, "server_overloaded")
            await alone()
        assert bodies.num_bytes == 0
        with bodies.counted(receive) as other:
            await other()

    asyncio.run(go())


def test_a_body_beside_too_many_others_is_refused(guarded, error_of, monkeypatch):
    monkeypatch.setattr(door, "MAX_BODIES_BYTES", 10)
    monkeypatch.setattr(Bodies, "__init__", lambda self: setattr(self, "num_bytes", 1))
    guarded.app.middleware_stack = None
    for path, body in (("/v1/completions", BODY), ("/tokenize", {"prompt": "hello"})):
        answer = guarded.post(path, body, headers=bearer(ALICE))
        assert "bytes of other bodies" in error_of(answer, 503)["message"]


def test_what_the_door_refuses_counts_for_its_route(guarded):
    guarded.get("/v1/models/tiny")
    guarded.post("/v1/completions", BODY)
    guarded.get("/v1/nowhere")
    routes = {("/v1/models/{model:path}", 401), ("/v1/completions", 401), ("none", 401)}
    assert routes == set(guarded.service.latencies.num_answered)


def test_a_fault_of_a_page_is_told_in_its_line_and_to_web_pages(make_world, monkeypatch, error_of, caplog):
    caplog.set_level("INFO", ACCESS.name)
    world = make_world(cors_origins=("https://chat.example",))
    monkeypatch.setattr(world.service, "check_model", mock.Mock(side_effect=ZeroDivisionError))
    answer = world.get("/v1/models/tiny", headers={"origin": "https://chat.example"})
    assert error_of(answer, 500)["code"] == "internal_error"
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    (line,) = (json.loads(record.message) for record in caplog.records if record.name == ACCESS.name)
    assert (line["status"], line["error"]) == (500, "internal_error")
    assert "ZeroDivisionError" in caplog.text
