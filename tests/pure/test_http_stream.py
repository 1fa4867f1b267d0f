"""Streams: what is sent and when, slow readers, clients that leave, engines that fail."""

import asyncio
import json
import random

import pytest

from actors.words.errors import GangFailure
from tests.serving import until_true

STREAM = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "stream": True, "ignore_eos": True}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 8,
    "temperature": 0,
    "stream": True,
    "ignore_eos": True,
}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
SENTENCE = "the quick brown fox jumps over the lazy dog, one two three"


class Client:
    """One ASGI exchange under the test's control."""

    def __init__(self, app, path, body):
        self.body = b""
        self.messages = []
        self.is_open = asyncio.Event()  # cleared: a reader that does not read
        self.is_open.set()
        self.send_error = None
        self._left = asyncio.Event()
        self._arrived = asyncio.Event()
        self._incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._incoming:
            return self._incoming.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if self.send_error:
            raise self.send_error
        self.messages.append(message)
        self.body += message.get("body", b"")
        self._arrived.set()
        await self.is_open.wait()

    def leave(self):
        self._left.set()

    @property
    def num_writes(self):
        return sum(message["type"] == "http.response.body" for message in self.messages)

    async def wait_for_writes(self, count):
        while self.num_writes < count:
            self._arrived.clear()
            await self._arrived.wait()

    def events(self):
        """The data of the server-sent events so far, parsed; [DONE] as a string."""
        assert self.body.endswith(b"\n\n")
        lines = self.body.decode().strip().split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def stream(world, path, body):
    """All events of one stream."""

    async def go():
        client = Client(world.app, path, body)
        await client.task
        assert client.messages[0]["status"] == 200
        assert [message["type"] for message in client.messages].count("http.response.start") == 1
        assert (b"content-type", b"text/event-stream; charset=utf-8") in client.messages[0]["headers"]
        assert client.messages[-1]["more_body"] is False
        return client.events()

    return asyncio.run(go())


@pytest.fixture
def ids_of(text):
    return lambda words: asyncio.run(text.encode([words]))[0]


def test_chat_stream_has_role_text_one_end_and_done(world):
    *chunks, done = stream(world, CHATS, CHAT)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
    ]
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    joined = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    plain = world.post(CHATS, {**CHAT, "stream": False}).json()
    assert joined == plain["choices"][0]["message"]["content"] != ""


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, STREAM), (CHATS, CHAT)])
def test_usage_comes_last_when_asked_for(world, path, body):
    *chunks, usage, done = stream(world, path, {**body, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == world.post(path, {**body, "stream": False}).json()["usage"]
    assert usage["usage"]["completion_tokens"] == 8


def test_streams_of_several_prompts_are_told_apart_by_index(world):
    body = {**STREAM, "prompt": [[5, 6, 7], [9], [5, 6, 7]]}
    *chunks, done = stream(world, COMPLETIONS, body)
    assert done == "[DONE]"
    texts, ends = ["", "", ""], [0, 0, 0]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] += choice["finish_reason"] is not None
    plain = world.post(COMPLETIONS, {**body, "stream": False}).json()
    assert texts == [choice["text"] for choice in plain["choices"]]
    assert texts[0] == texts[2] != texts[1]
    assert ends == [1, 1, 1]


def test_stop_strings_never_show_not_even_in_part(make_world, ids_of):
    world = make_world(script=ids_of(SENTENCE))
    *chunks, done = stream(world, COMPLETIONS, {**STREAM, "max_tokens": 100, "stop": "jumps over the"})
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert done == "[DONE]"
    assert "".join(texts) == "the quick brown fox "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    world.wait_until_idle()


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_stop_string_frees_the_engine_before_max_tokens(make_world, scripted_executor, ids_of, is_stream):
    script = ids_of(SENTENCE)
    executor = scripted_executor(script, vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    body = {**STREAM, "max_tokens": 100, "stop": "quick", "stream": is_stream}

    async def go():
        client = Client(world.app, COMPLETIONS, body)
        await until_true(lambda: client.task.done() or (executor.release() and False))
        await until_true(lambda: world.engine.snapshot().running == 0)

    asyncio.run(go())
    assert len(executor.steps) < len(script)
    executor.release(100)
    world.wait_until_idle()


def test_characters_are_never_cut_in_half(make_world, ids_of):
    words = "🦊 你好 ñandú 🇨🇭"
    world = make_world(script=ids_of(words))
    *chunks, _ = stream(world, COMPLETIONS, {**STREAM, "max_tokens": len(ids_of(words))})
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == words
    assert not any("\ufffd" in text for text in texts)


class WatchedLoop(asyncio.SelectorEventLoop):
    """An event loop that remembers every timer that is set on it."""

    def __init__(self):
        super().__init__()
        self.timers = []

    def call_at(self, when, callback, *args, **options):
        self.timers.append(callback)
        return super().call_at(when, callback, *args, **options)

    def call_later(self, delay, callback, *args, **options):
        self.timers.append(callback)
        return super().call_later(delay, callback, *args, **options)


@pytest.mark.parametrize("words", [SENTENCE, "🦊 你好 🇨🇭"])  # of the second, most tokens are part of a character
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, STREAM), (CHATS, CHAT)])
def test_every_token_is_sent_at_once_and_no_timer_stands_in_between(
    make_world, scripted_executor, ids_of, path, body, words
):
    script = ids_of(words)
    executor = scripted_executor(script, vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    loop = WatchedLoop()

    async def go():
        client = Client(world.app, path, {**body, "max_tokens": len(script)})
        while not executor._done:  # the first step is with the executor
            await asyncio.sleep(0)
        for num_tokens in range(1, len(script) + 1):
            loop.timers.clear()
            num_before = client.num_writes
            while not executor.release():  # one result, and so one event
                await asyncio.sleep(0)
            await client.wait_for_writes(num_before + 1)
            assert client.num_writes == num_tokens
            assert loop.timers == []
        await client.task
        events = client.events()
        assert events[-1] == "[DONE]"

    try:
        loop.run_until_complete(go())
    finally:
        loop.close()


def test_a_slow_reader_gets_few_and_larger_chunks(make_world, scripted_executor, ids_of):
    script = ids_of(SENTENCE * 3)
    executor = scripted_executor(script, vocab_size=400, is_manual=True)
    world = make_world(executor=executor)

    async def go():
        client = Client(world.app, COMPLETIONS, {**STREAM, "max_tokens": len(script)})
        client.is_open.clear()
        await until_true(lambda: executor.release() and client.messages)
        for _ in range(len(script) * 2):
            executor.release()
            await asyncio.sleep(0.001)
        await until_true(lambda: executor.release() == 0 and world.engine.snapshot().running == 0)
        assert client.num_writes <= 1  # nothing was pushed at somebody who does not read
        assert len(world.outbox._mailboxes) <= 1
        client.is_open.set()
        await client.task
        *chunks, done = client.events()
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == SENTENCE * 3
        assert client.num_writes <= 3 < len(script)

    asyncio.run(go())
    world.wait_until_idle()


WAYS = ["leave", "cancel", "send fails"]


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_leaves_ends_its_request(make_world, scripted_executor, ids_of, way, num_tokens, is_stream):
    executor = scripted_executor(ids_of(SENTENCE), vocab_size=400, is_manual=True)
    world = make_world(executor=executor, max_requests=1)
    finished = []
    finish = world.engine.finish
    world.engine.finish = lambda *args, **options: (finished.append(args), finish(*args, **options))

    async def go():
        client = Client(world.app, COMPLETIONS, {**STREAM, "max_tokens": 12, "stream": is_stream})
        await until_true(lambda: executor._done)
        for _ in range(num_tokens):
            await until_true(executor.release)
            await asyncio.sleep(0.002)
        if way == "leave":
            client.leave()
            await client.task
        elif way == "cancel":
            client.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await client.task
        else:
            client.send_error = OSError("connection lost")
            await until_true(lambda: executor.release() == 0 and client.task.done())
            await client.task
        assert world.service.admission.num_admitted == 0
        assert not client.body.endswith(b"[DONE]\n\n")

    asyncio.run(go())
    if is_stream or way != "send fails":
        assert len(finished) == 1
    executor.release(100)
    world.wait_until_idle()
    assert world.outbox._mailboxes == {}


def test_a_client_may_leave_while_its_prompt_is_tokenized(make_world, monkeypatch):
    world = make_world()

    async def go():
        started, gate = asyncio.Event(), asyncio.Event()

        async def slow_encode(prompts, add_special_tokens):
            started.set()
            await gate.wait()

        monkeypatch.setattr(world.text, "encode", slow_encode)
        client = Client(world.app, COMPLETIONS, STREAM)
        await started.wait()
        assert world.service.admission.num_admitted == 1
        client.leave()
        await client.task
        assert world.service.admission.num_admitted == 0
        assert client.messages == []

    asyncio.run(go())
    world.wait_until_idle()


def phases(engine):
    """Where the engine's sequences stand right now."""
    for sequence in list(engine._scheduler._live.values()):
        if sequence.lane is None:
            yield "queued"
        elif sequence.num_generated:
            yield "decoding"
        elif 0 < sequence.num_scheduled < len(sequence.request.prompt_ids):
            yield "mid-prefill"


@pytest.mark.timeout(100)
def test_500_clients_leaving_at_random_leave_nothing_behind(make_world, scripted_executor):
    executor = scripted_executor(vocab_size=400, is_manual=True)
    world = make_world(executor=executor, max_requests=4000)
    dice = random.Random(0)
    seen = set()

    async def one():
        path = dice.choice([COMPLETIONS, CHATS])
        body = {**STREAM, "prompt": [5, 6, *dice.choices(range(400), k=dice.choice([1, 100]))], "max_tokens": 25}
        body |= {"stream": dice.random() < 0.5, "n": dice.choice([1, 1, 4]), "temperature": 1}
        body |= {"logprobs": 2, "echo": dice.random() < 0.3} if dice.random() < 0.3 else {}
        if path == CHATS:
            body = {**CHAT, "stream": body["stream"], "n": body["n"], "max_tokens": 25}
        await asyncio.sleep(dice.random())
        client = Client(world.app, path, body)
        await asyncio.sleep(dice.random() ** 3)
        seen.update(phases(world.engine))
        client.leave() if dice.random() < 0.5 else client.task.cancel()
        await asyncio.gather(client.task, return_exceptions=True)

    async def keep_going():
        while True:
            executor.release()
            await asyncio.sleep(0.0005)

    async def go():
        pump = asyncio.ensure_future(keep_going())
        await asyncio.gather(*(one() for _ in range(500)))
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(go())
    assert seen == {"queued", "mid-prefill", "decoding"}
    assert world.service.admission.num_admitted == 0
    assert world.outbox._mailboxes == {}
    executor.release(100)
    world.wait_until_idle()
    assert world.engine.stats.num_finished["abort"] > 100


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, STREAM), (CHATS, CHAT)])
def test_an_engine_failure_in_a_stream_is_an_error_event_and_no_done(make_world, scripted_executor, ids_of, path, body):
    executor = scripted_executor(ids_of(SENTENCE), vocab_size=400, is_manual=True)
    world = make_world(executor=executor)

    async def go():
        client = Client(world.app, path, body)
        await until_true(executor.release)
        await client.wait_for_writes(1)
        executor.fail(GangFailure("rank 1 died, see /var/log/ray/session/x.log"))
        await client.task
        *chunks, error = client.events()
        assert chunks
        assert set(error) == {"error"}
        assert error["error"]["type"] == "server_error"
        assert "rank 1 died" in error["error"]["message"]
        assert "/var/log" not in error["error"]["message"]
        assert client.messages[-1]["more_body"] is False
        assert world.service.admission.num_admitted == 0

    asyncio.run(go())


ENDS = {"the gang fails": lambda world: world.executor.fail(GangFailure("rank 1 died")), "shut down": None}


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_an_engine_failure_before_anything_is_sent_has_a_status(
    make_world, scripted_executor, ids_of, end, is_stream, num_tokens
):
    executor = scripted_executor(ids_of(SENTENCE), vocab_size=400, is_manual=True)
    world = make_world(executor=executor)

    async def go():
        client = Client(world.app, COMPLETIONS, {**STREAM, "stream": is_stream, "n": 2})
        await until_true(lambda: executor._done)
        for _ in range(0 if is_stream else num_tokens):
            await until_true(executor.release)
        if ENDS[end] is None:
            await asyncio.to_thread(world.engine.close)
        else:
            ENDS[end](world)
        await client.task
        assert client.messages[0]["status"] == 503
        assert 1 <= int(dict(client.messages[0]["headers"])[b"retry-after"]) <= 60
        error = json.loads(client.body)["error"]
        assert (error["code"], error["type"]) == ("engine_failure", "server_error")

    asyncio.run(go())
    assert world.service.admission.num_admitted == 0


def test_a_fault_of_ours_in_a_stream_ends_only_that_stream(make_world, scripted_executor, ids_of, monkeypatch):
    executor = scripted_executor(ids_of(SENTENCE), vocab_size=400, is_manual=True)
    world = make_world(executor=executor)

    async def go():
        client, neighbor = (Client(world.app, COMPLETIONS, STREAM) for _ in range(2))
        await until_true(lambda: executor.release() and client.num_writes and neighbor.num_writes)
        broken = next(iter(world.outbox._mailboxes.values()))
        monkeypatch.setattr(broken, "take", None)
        await until_true(lambda: executor.release() == 0 and client.task.done() and neighbor.task.done())
        last = [each.events()[-1] for each in (client, neighbor)]
        ends = sorted(event if isinstance(event, str) else "error" for event in last)
        assert ends == ["[DONE]", "error"]

    asyncio.run(go())
    world.wait_until_idle()
