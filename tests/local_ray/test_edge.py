"""Behind Serve's own HTTP code, in both proxy modes: nothing that a client sends outlives it, and a stop waits for all.

The run in the default proxy is for everybody; `-m soak` has HAProxy too, both without the edge, and the whole corpus.
"""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.hostile.corpus import Case, Target, check, corpus, golden_requests, said, send
from tests.local_ray.demo import (
    assert_examples_work,
    assert_four_ranks,
    assert_printed_command_works,
    assert_readme_example_works,
    assert_streams_at_once_equal_one_by_one,
    assert_structured_answers,
    assert_trained_answers,
    client_of,
)
from tests.prometheus import not_there, panels
from tests.serving import Run, until

pytest.importorskip("ray")

pytestmark = pytest.mark.timeout(400)

TARGET = Target("stagemesh-demo", 1024, 512, 64, 1024 * 1024 + 512 * 16, 60.0)
LONG = {"model": TARGET.model, "prompt": "A stage", "max_tokens": 480, "temperature": 0, "ignore_eos": True}
EDGE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
WAYS = [
    pytest.param((False, True), id="proxy"),
    pytest.param((False, False), id="proxy, no edge", marks=pytest.mark.soak),
    pytest.param((True, True), id="haproxy", marks=pytest.mark.soak),
    pytest.param((True, False), id="haproxy, no edge", marks=pytest.mark.soak),
]


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[bool, bool]:
    """Whether HAProxy is there, and whether the edge is."""
    found: tuple[bool, bool] = request.param
    return found


@pytest.fixture(scope="module")
def run(way: tuple[bool, bool], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    ha_proxy, edge = way
    environment = {} if edge else {EDGE: ""}
    limits = {
        "admission": {"max_requests": TARGET.max_requests},
        "timeouts": {"request_s": TARGET.request_s, "drain_s": 60.0},
    }
    with Run(tmp_path_factory.mktemp("run"), ha_proxy=ha_proxy, environment=environment, **limits) as run:
        run.wait_for()
        yield run


def test_a_request_is_found_in_the_log_by_the_id_that_its_answer_has(run: Run, way: tuple[bool, bool]) -> None:
    body = {**LONG, "max_tokens": 2}
    for given in ("mine-1", None, *(["not sane: two words"] if way[1] else [])):
        headers = {} if given is None else {"x-request-id": given}
        answer = httpx.post(f"{run.url}/v1/completions", json=body, headers=headers, timeout=60)
        (name,) = answer.headers.get_list("x-request-id")
        assert (name == given) is (given == "mine-1")
        until(lambda name=name: f'"request_id":"{name}","method":"POST"' in run.printed())


def commands() -> list[Case]:
    return [case for case in corpus(TARGET) if case.id.startswith("header: ")]


def test_the_model_is_what_the_corpus_takes_it_for(run: Run) -> None:
    (card,) = run.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (TARGET.model, TARGET.max_model_len)
    wrong = run.post({**LONG, "prompt": [TARGET.vocab_size]})
    assert f"from 0 to {TARGET.vocab_size - 1}" in wrong.json()["error"]["message"]


def test_the_demo_answers_what_it_was_trained_to(run: Run) -> None:
    assert_printed_command_works(run)
    with client_of(run) as client:
        assert_trained_answers(client, share=3)
        assert_streams_at_once_equal_one_by_one(client)
    assert_four_ranks(run)


def test_structured_answers_over_two_shards_and_two_stages(run: Run) -> None:
    with client_of(run) as client:
        assert_structured_answers(client)


def test_the_programs_that_docs_show_work(run: Run) -> None:
    assert_readme_example_works(run)
    assert_examples_work(run)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    "header",
    [b"accept: */*", b"x-request-disconnect-disabled: ?1", b"x-request-timeout-seconds: 0"],
)
def test_no_header_keeps_a_request_alive_whose_client_has_left(run: Run, header: bytes, is_stream: bool) -> None:
    before = run.finished("abort")
    name, _, value = header.partition(b": ")
    body = json.dumps({**LONG, "stream": is_stream}).encode()
    headers = ((b"content-type", b"application/json"), (name, value))
    with socket.create_connection(run.address, timeout=20) as connection:
        connection.sendall(Case("", (), body, headers=headers).request())
        until(lambda: run.cluster()["requests"]["running"] == 1, within_s=20)
    until(lambda: run.finished("abort") == before + 1, within_s=5)
    until(run.is_idle, within_s=2)


def test_the_board_finds_its_series_in_what_is_served(run: Run) -> None:
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    missing = not_there(queries, run.get("/metrics").text)
    assert [name for name in missing if "key" not in name] == []  # the demo asks for no API keys


def test_a_deadline_holds_behind_the_proxy(run: Run) -> None:
    before = run.finished("timeout")
    answer = run.post({**LONG, "timeout": 0.3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    with httpx.stream("POST", run.url + "/v1/completions", json={**LONG, "timeout": 0.5, "stream": True}) as stream:
        text = stream.read().decode()
    assert "[DONE]" not in text
    assert '"code":"timeout"' in text
    assert run.finished("timeout") == before + 2
    until(run.is_idle, within_s=2)


def test_a_body_that_an_upgrade_loses_is_said_to_be_lost(run: Run, way: tuple[bool, bool]) -> None:
    """Java's client asks for h2c, and httptools, by which Serve's own proxy reads, stops there."""
    (case,) = [case for case in corpus(TARGET) if case.id.endswith("as Java sends it")]
    answer = send(run.address, case)
    check(case, answer)
    assert answer.status == (200 if way[0] else 400)
    assert way[0] or b"the body was lost" in answer.body


def test_headers_are_read_or_left_out(run: Run, way: tuple[bool, bool]) -> None:
    """Without the edge Serve answers 500 to those that are not UTF-8; nothing more comes of it."""
    for case in commands():
        answer = send(run.address, case)
        if way[1]:
            check(case, answer)
        else:
            assert answer.status in (200, 400, 500), f"{case.id}: {answer.status}"
    until(run.is_idle, within_s=2)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_whole_corpus_beside_four_streams(
    run: Run, way: tuple[bool, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """R6, R7: every case is answered as promised, no stream notices, no rank is another, nothing is held."""
    goldens = golden_requests(TARGET, 16)
    golden = [said(send(run.address, request).body) for request in goldens]
    before, mistakes, slowest_s = run.cluster(), [], 0.0
    pids = [rank["pid"] for rank in before["ranks"]]
    cases = corpus(TARGET)
    with ThreadPoolExecutor(len(goldens)) as threads:
        for case in cases:
            if not way[1] and case.id.startswith("header: "):
                continue
            streams = [threads.submit(send, run.address, request) for request in goldens]
            answer = send(run.address, case)
            slowest_s = max(slowest_s, answer.seconds)
            try:
                check(case, answer)
            except (AssertionError, KeyError, ValueError) as mistake:
                mistakes.append(str(mistake) or repr(mistake))
            if [said(stream.result().body) for stream in streams] != golden:
                mistakes.append(f"{case.id}: a golden stream says something else")
            until(run.is_idle, within_s=2)
    after = run.cluster()
    with capsys.disabled():
        print(f"\n{len(cases)} cases, slowest answer {slowest_s:.2f} s, epoch {after['epoch']}")
    assert not mistakes, "\n" + "\n".join(mistakes)
    assert (after["epoch"], after["replica"]) == (before["epoch"], before["replica"])
    assert [rank["pid"] for rank in after["ranks"]] == pids


class Stream(threading.Thread):
    """One stream in a thread of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self._address = run.address
        self.received = b""
        self.start()

    def run(self) -> None:
        case = Case("", (200,), json.dumps({**LONG, "max_tokens": 300, "stream": True}).encode())
        with socket.create_connection(self._address, timeout=120) as connection:
            connection.sendall(case.request())
            while part := connection.recv(1 << 16):
                self.received += part


def test_sigterm_lets_streams_finish_and_leaves_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A40, R15. The last test of a run: it ends it."""
    streams = [Stream(run) for _ in range(4)]
    until(lambda: all(b"data: " in stream.received for stream in streams), within_s=60)
    began = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    seen: set[object] = set()

    def is_refused() -> bool:
        try:
            answer = run.post({**LONG, "max_tokens": 1}, timeout_s=10)
        except httpx.TransportError:
            seen.add("refused")
            return True
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "server_draining"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        seen.add(answer.status_code)
        return answer.status_code != 200

    unready_s = until(is_refused, within_s=10)
    assert run.get("/ready").status_code == 503
    assert run.get("/health").status_code == 200
    assert not any(b"[DONE]" in stream.received for stream in streams), "too short to show anything"
    for stream in streams:
        stream.join(120)
    finished_s = time.monotonic() - began
    assert [b"data: [DONE]\n\n" in stream.received for stream in streams] == [True] * 4
    assert run.wait(90) == 0, run.printed()
    ended_s = time.monotonic() - began
    until(lambda: not run.processes() and not run.segments(), within_s=10)
    assert seen <= {200, 503, "refused"}
    with capsys.disabled():
        print(f"\nSIGTERM: refused after {unready_s:.2f} s, streams done {finished_s:.1f} s, all gone {ended_s:.1f} s")
