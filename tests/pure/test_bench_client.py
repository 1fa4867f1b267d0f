"""The load client against a server with a script (delays, errors, broken streams), and against our own app."""

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments import cli
from deployments.bench.client import Client, Stream, StreamError
from deployments.bench.drive import Extent, Progress, drive
from deployments.bench.figures import Load, Timeline
from deployments.bench.load import COMPLETIONS, Ask
from deployments.bench.progress import line, shown
from tests.serving import free_port

Write = Callable[[bytes], Awaitable[None]]
Script = Callable[[int, dict[str, Any], Write], Awaitable[None]]  # number of the request, its body, the way out


class Server:
    """An OpenAI-like server whose answers are a script; it notes what it is asked."""

    def __init__(self, script: Script, models: bytes = b'{"data": [{"id": "m", "max_model_len": 512}]}') -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[bytes] = []
        self.num_connections = 0
        self.models_status = b"200 OK"
        self._script, self._models = script, models

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=10)
            server.close()
            loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                sizes = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-len")]
                body = await reader.readexactly(int(sizes[0])) if sizes else b""
                await self._answer(head, body, writer)

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        self.headers.append(head)
        if head.startswith(b"GET /v1/models"):
            await write(_whole(self.models_status, self._models))
        elif head.startswith(b"POST /tokenize"):
            await write(_whole(b"404 Not Found", b"no such page"))
        else:
            self.bodies.append(json.loads(body))
            await self._script(len(self.bodies) - 1, self.bodies[-1], write)


def _whole(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


BEGIN = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def part(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"text": text, "finish_reason": finish}])


USAGE = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


async def fine(number: int, body: dict[str, Any], write: Write) -> None:
    await write(BEGIN + part(token("a")))
    await write(part(token("b")))
    await write(part(token("c", "length") + USAGE + DONE) + END)


def answer_of(script: Script, timeout_s: float = 20.0) -> Timeline:
    async def go(url: str) -> Timeline:
        async with Client(url, None, timeout_s, {"stream": True}) as client:
            return await client.send(Ask(COMPLETIONS, {"prompt": [1, 2]}, 2))

    with Server(script).serve() as url:
        return asyncio.run(go(url))


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def figures_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = run_bench(capsys, *arguments, "--json")
    assert code == 0
    report: dict[str, Any] = json.loads(out)
    return report


# -- one answer --------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_script() -> None:
    """A first token after 0.2 s, another 0.1 s later: never earlier, and in this order of size."""

    async def slow(number: int, body: dict[str, Any], write: Write) -> None:
        await asyncio.sleep(0.2)
        await write(BEGIN + part(token("a")))
        await asyncio.sleep(0.1)
        await write(part(token("b")))
        await asyncio.sleep(0.3)
        await write(part(token("c", "length") + USAGE + DONE) + END)

    timeline = answer_of(slow)
    assert not timeline.error
    assert (timeline.prompt_tokens, timeline.output_tokens, len(timeline.chunks_s)) == (5, 3, 3)
    assert timeline.ttft_s >= 0.2
    assert timeline.gaps_s[1] > timeline.gaps_s[0] >= 0.09
    assert timeline.latency_s >= 0.6
    assert timeline.tpot_s == pytest.approx(sum(timeline.gaps_s) / 2)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (
            _whole(b"400 Bad Request", b'{"error": {"message": "max_tokens: too many"}}'),
            "HTTP 400: max_tokens: too many",
        ),
        (_whole(b"503 Service Unavailable", b"<h1>busy</h1>\n now"), "HTTP 503: <h1>busy</h1> now"),
        (_whole(b"422 Unprocessable", b'{"detail": "prompt"}'), "HTTP 422: prompt"),
        (_whole(b"200 OK", b'{"choices": []}'), "the stream ended without [DONE]"),
        (BEGIN + part(token("a")) + END, "the stream ended without [DONE]"),
        (BEGIN + part(DONE) + END, "an answer without tokens"),
        (
            BEGIN + part(token("a") + event(error={"message": "the gang is lost"})) + END,
            "an error in the stream: the gang",
        ),
        (BEGIN + part(b"data: {]\n\n") + END, "a chunk that cannot be read"),
    ],
)
def test_every_failure_is_named(sent: bytes, error: str) -> None:
    async def script(number: int, body: dict[str, Any], write: Write) -> None:
        await write(sent)

    timeline = answer_of(script)
    assert timeline.error.startswith(error), timeline.error
    assert timeline.ended_s >= timeline.sent_s


def test_a_connection_that_breaks_and_an_answer_that_never_ends() -> None:
    async def breaks(number: int, body: dict[str, Any], write: Write) -> None:
        await write(BEGIN + part(token("a")))
        raise ConnectionResetError

    async def hangs(number: int, body: dict[str, Any], write: Write) -> None:
        await write(BEGIN + part(token("a")))
        await asyncio.sleep(5)

    assert answer_of(hangs, timeout_s=0.3).error == "no end within 0.3 s"

    class Closing(Server):
        async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await super()._connection(reader, writer)
            writer.close()

    async def go(url: str) -> Timeline:
        async with Client(url, None, 20, {}) as client:
            return await client.send(Ask(COMPLETIONS, {"prompt": [1]}, 1))

    with Closing(breaks).serve() as url:
        assert asyncio.run(go(url)).error == "the connection broke in the middle of the stream"


def test_a_server_that_is_gone() -> None:
    async def go() -> Timeline:
        async with Client(f"http://127.0.0.1:{free_port()}", None, 20, {}) as client:
            return await client.send(Ask(COMPLETIONS, {"prompt": [1]}, 1))

    assert asyncio.run(go()).error.startswith("no answer: Connect call failed")


def chat(finish: str | None = None, **delta: Any) -> bytes:
    return event(choices=[{"delta": delta, "finish_reason": finish}])


@pytest.mark.parametrize(
    ("events", "times"),
    [
        ([(1, token("a")), (2, token("")), (3, token("b", "length"))], [1, 2, 3]),  # half a character is a token too
        ([(1, token("a")), (2, token("b") + token("", "length"))], [1, 2]),  # ours: the end comes with the last token
        ([(1, token("a")), (2, token("", "stop"))], [1, 2]),  # vLLM's: an end that comes alone is a token without text
        ([(1, chat(role="assistant", content="")), (2, chat(content="x")), (3, chat("stop"))], [2, 3]),
        ([(1, chat(role="assistant", content="x")), (2, chat(reasoning_content="y"))], [1, 2]),
        ([(1, b": ping\n\nevent: x\n" + token("a")), (2, USAGE)], [1]),
    ],
)
def test_which_chunks_are_tokens(events: list[tuple[int, bytes]], times: list[int]) -> None:
    timeline = Timeline(0.0)
    stream = Stream(timeline)
    for now, data in events:
        stream.feed(data, float(now))
    assert timeline.chunks_s == times


def test_a_stream_may_be_cut_anywhere_and_end_its_lines_either_way() -> None:
    whole = (token("é") + token("b") + USAGE + DONE).replace(b"\n", b"\r\n")
    for size in (1, 7, len(whole)):
        timeline = Timeline(0.0)
        stream = Stream(timeline)
        for at in range(0, len(whole), size):
            stream.feed(whole[at : at + size], float(at + 1))
        assert stream.is_done and len(timeline.chunks_s) == 2 and timeline.output_tokens == 3
    with pytest.raises(StreamError, match="cannot be read"):
        Stream(Timeline(0.0)).feed(b"data: {]\n", 1.0)


# -- loops -------------------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_so_many_requests_in_flight() -> None:
    async def go() -> None:
        running = most = 0

        async def send(index: int) -> Timeline:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return Timeline(time.perf_counter(), [time.perf_counter()], time.perf_counter(), error="x" * (index == 3))

        progress = Progress(Load(concurrency=3), Extent(num_requests=10))
        await drive(send, progress, seed=0)
        assert (most, progress.num_sent, len(progress.timelines), progress.num_failed) == (3, 10, 10, 1)
        assert (progress.share, progress.num_tokens) == (1.0, 9)

    asyncio.run(go())


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def go() -> None:
        sent: list[int] = []
        everything_sent = asyncio.Event()

        async def send(index: int) -> Timeline:
            sent.append(index)
            if len(sent) == 20:
                everything_sent.set()
            await everything_sent.wait()  # no answer before the last request is sent
            return Timeline(0.0, [1.0], 1.0)

        progress = Progress(Load(rate=1000.0), Extent(num_requests=20))
        await asyncio.wait_for(drive(send, progress, seed=0), timeout=20)
        assert sent == list(range(20)) and len(progress.timelines) == 20

    asyncio.run(go())


def test_seconds_end_the_sending_not_the_answers() -> None:
    async def go() -> None:
        async def send(index: int) -> Timeline:
            await asyncio.sleep(0.15)
            return Timeline(0.0, [1.0], 1.0)

        for load in (Load(concurrency=2), Load(rate=50.0)):
            progress = Progress(load, Extent(seconds=0.2))
            await drive(send, progress, seed=0)
            assert 0 < progress.num_sent == len(progress.timelines)
            assert progress.share == 1.0

    asyncio.run(go())


class Terminal:
    """Notes what is drawn."""

    def __init__(self, is_terminal: bool) -> None:
        self.text, self._is_terminal = "", is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self._is_terminal


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    async def go(stream: Any) -> str:
        progress = Progress(Load(concurrency=2), Extent(num_requests=4))
        async with shown(progress, stream):
            progress.num_sent = 3
            progress.add(Timeline(0.0, [1.0, 2.0], 2.0))
            progress.add(Timeline(0.0, [], 2.0, error="x"))
            await asyncio.sleep(0.6 if stream.isatty() else 0)
        text: str = stream.text
        return text

    drawn = asyncio.run(go(Terminal(is_terminal=True)))
    assert drawn.count("\r\x1b[K") >= 2 and drawn.count("\n") == 1
    assert "c=2    [############............] 2 of 4 done, 1 running" in drawn and ", 1 failed" in drawn
    plain = asyncio.run(go(Terminal(is_terminal=False)))
    assert plain.count("\n") == 1 and "\x1b" not in plain and "[#" not in plain
    assert "0 done, 0 running" in line(Progress(Load(rate=0.5), Extent(seconds=9.0)), with_bar=False)


# -- the command -------------------------------------------------------------------------------------------------


def test_a_sweep_over_a_server_that_sometimes_fails(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(number: int, body: dict[str, Any], write: Write) -> None:
        if number % 4 == 3:
            await write(_whole(b"503 Service Unavailable", b'{"error": {"message": "full"}}'))
        else:
            await fine(number, body, write)

    server = Server(script)
    with server.serve() as url:
        arguments = ["--concurrency", "1", "2", "--num-requests", "8", "--seed", "5", "--output-len", "3"]
        report = figures_of(capsys, f"{url}/v1/", *arguments, "--ignore-eos", "--goodput", "ttft_ms:60000")
        text = run_bench(capsys, url, *arguments)[1]
    assert [one["concurrency"] for one in report["figures"]] == [1, 2]
    for one in report["figures"]:
        assert (one["completed"], one["failed"], one["failures"]) == (6, 2, {"HTTP 503: full": 2})
        assert (one["prompt_tokens"], one["output_tokens"]) == (30, 18)
        assert one["goodput_per_s"] == one["requests_per_s"] > 0
    assert (report["model"], report["seed"], report["prompts"]) == ("m", 5, "64 random words")
    assert "c=1: 2 x HTTP 503: full" in text
    first = server.bodies[0]
    assert {key: first[key] for key in ("model", "max_tokens", "temperature", "stream", "stream_options")} == {
        "model": "m",
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert first["ignore_eos"] is True and "seed" not in first and "ignore_eos" not in server.bodies[-1]
    prompts = [body["prompt"] for body in server.bodies]
    assert len(set(prompts[:17])) == 17 and set(prompts[:17]) == set(prompts[17:]), "all different, and the seed's"
    assert server.num_connections < len(prompts), "connections are kept"


def test_a_server_that_names_sampling_defaults_is_asked_for_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    named = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "max_tokens": 512, "new": 1}
    server = Server(fine, json.dumps({"data": [{"id": "m", "sampling_defaults": named}]}).encode())
    with server.serve() as url:
        figures_of(capsys, url, "--num-requests", "1", "--output-len", "3")
    for body in server.bodies:
        assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0, 1, 0, 1)
        assert body["max_tokens"] == 3 and not {"min_p", "new", "seed"} & set(body)


def test_conversations_go_to_the_chats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async def script(number: int, body: dict[str, Any], write: Write) -> None:
        opening = chat(role="assistant", content="")
        await write(BEGIN + part(opening + chat(content="x") + chat("stop") + USAGE + DONE) + END)

    (tmp_path / "talk.jsonl").write_text('[{"role": "user", "content": "one"}]\n[{"role": "user", "content": "two"}]\n')
    server = Server(script)
    with server.serve() as url:
        arguments = ["--conversations", str(tmp_path / "talk.jsonl"), "--num-requests", "3", "--temperature", "1"]
        report = figures_of(capsys, url, *arguments, "--seed", "9")
    assert [body["messages"][0]["content"] for body in server.bodies] == ["one", "one", "two", "one"]
    assert [body["seed"] for body in server.bodies[1:]] == [9, 10, 11]
    assert server.bodies[0]["max_completion_tokens"] == 64
    assert report["figures"][0]["completed"] == 3


def test_the_key_comes_from_a_file_or_the_environment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(fine)
    (tmp_path / "key").write_text("of-a-file\n")
    with server.serve() as url:
        monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
        figures_of(capsys, url, "--num-requests", "1")
        assert all(b"Authorization: Bearer of-the-environment\r\n" in head for head in server.headers)
        server.headers.clear()
        report = figures_of(capsys, url, "--num-requests", "1", "--api-key-file", str(tmp_path / "key"))
        assert all(b"Authorization: Bearer of-a-file\r\n" in head for head in server.headers)
    assert "of-a-file" not in json.dumps(report)
    (tmp_path / "key").write_text(" \n")
    for name, named in (("key", "holds no key"), ("absent", "cannot be read")):
        code, _, err = run_bench(capsys, url, "--api-key-file", str(tmp_path / name))
        assert code == 1 and f"--api-key-file: {tmp_path / name} {named}" in err


@pytest.mark.parametrize(
    ("status", "models", "arguments", "said"),
    [
        (b"401 Unauthorized", b"", [], "wants an API key: set OPENAI_API_KEY, or give --api-key-file"),
        (b"404 Not Found", b'{"detail": "Not Found"}', [], "/v1/models answers HTTP 404: Not Found; give the URL"),
        (b"200 OK", b"<html>", [], "/v1/models answers no list of models"),
        (b"200 OK", b'{"data": [{"id": "m"}]}', ["--model", "n"], "--model: .* does not serve n; it has m"),
        (b"200 OK", b'{"data": []}', [], "does not serve None; it has none"),
        (b"200 OK", b'{"data": [{"id": "m"}]}', ["--tokenizer", "/nowhere"], "--tokenizer: /nowhere"),
    ],
)
def test_a_server_that_cannot_be_loaded_is_said(
    status: bytes, models: bytes, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(fine, models)
    server.models_status = status
    with server.serve() as url:
        code, out, err = run_bench(capsys, url, *arguments)
    assert (code, out) == (1, "")
    assert re.search(said, err), err


def test_what_the_first_request_meets_is_said_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(number: int, body: dict[str, Any], write: Write) -> None:
        await write(_whole(b"400 Bad Request", b'{"error": {"message": "ignore_eos: unknown"}}'))

    with Server(script).serve() as url:
        code, _, err = run_bench(capsys, url, "--ignore-eos")
    assert code == 1
    assert "the first request failed: HTTP 400: ignore_eos: unknown; change the option that the server names" in err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_bench(capsys, f"http://127.0.0.1:{free_port()}")
    assert (code, out) == (1, "")
    assert "no server answers there (Connect call failed" in err
    assert (
        "is no URL; give one such as http://127.0.0.1:8000, or --offline" in run_bench(capsys, "configs/demo.yaml")[2]
    )


def test_when_all_fail_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(number: int, body: dict[str, Any], write: Write) -> None:
        await (fine(number, body, write) if number == 0 else write(_whole(b"500 Oops", b"")))

    with Server(script).serve() as url:
        code, out, _ = run_bench(capsys, url, "--num-requests", "2")
    assert code == 1
    assert "c=1: 2 x HTTP 500: no message" in out


def test_arrivals_that_never_come(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(fine).serve() as url:
        code, _, err = run_bench(capsys, url, "--rate", "0.001", "--seconds", "0.1", "--seed", "1")
    assert code == 1
    assert "0.001/s: no request was due within 0.1 s; give more --seconds" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--concurrency", "0"], "argument --concurrency: 0: give a whole number of at least 1"),
        (["--rate", "-1"], "argument --rate: -1 is no number above 0"),
        (["--rate", "inf"], "argument --rate: inf is no number above 0"),
        (["--rate", "1", "--concurrency", "1"], "not allowed with argument"),
        (["--goodput", "itl_ms:3"], "give NAME:MILLISECONDS with a name of ttft_ms, tpot_ms, e2e_ms"),
        (["--goodput", "ttft_ms:x"], "x is no number above 0"),
        (["--layouts", "2x1"], "--layouts is for gangs: give --offline, or leave it out"),
        (["x.yaml", "--offline", "--rate", "1"], "--rate is for a server that runs: leave --offline out"),
        (["x.yaml", "--offline", "--layouts", "2x"], "2x: give shards x stages, for example 2x1"),
        (["--offline"], "--offline needs a config file"),
        (["--conversations", "x", "--chat"], "--conversations brings its prompts"),
        (["--chat", "--tokenizer", "x"], "--chat sends words"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


# -- our own app -------------------------------------------------------------------------------------------------


def test_our_own_app_over_a_socket(make_world: Any, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path) -> None:
    world = make_world()
    with world.serve() as url:
        arguments = ["--input-len", "20", "--output-len", "12", "--ignore-eos", "--num-requests", "12"]
        by_server = figures_of(capsys, url, *arguments, "--concurrency", "1", "4")
        by_tokenizer = figures_of(capsys, url, *arguments, "--tokenizer", str(tokenizer_folder), "--rate", "200")
        shared = figures_of(capsys, url, *arguments, "--prefix-len", "32", "--num-prefixes", "2")
        chats = figures_of(capsys, url, "--chat", "--input-len", "4", "--num-requests", "2", "--ignore-eos")
        code, _, err = run_bench(capsys, url, "--input-len", "100", "--output-len", "100")
    for report in (by_server, by_tokenizer):
        for one in report["figures"]:
            assert (one["completed"], one["failed"]) == (12, 0)
            assert (one["prompt_tokens"], one["output_tokens"]) == (12 * 20, 12 * 12), "usage is what was asked for"
    assert by_server["prompts"] == "20 random token ids"
    assert shared["figures"][0]["prompt_tokens"] == 12 * 52
    assert world.engine.stats.num_prompt_cached >= 9 * 32, "two of the blocks' worth of a shared prefix is reused"
    assert chats["figures"][0]["output_tokens"] == 2 * 64
    assert code == 1
    assert "--prefix-len, --input-len and --output-len: 200 tokens together, but the server takes 128" in err
    world.wait_until_idle()
