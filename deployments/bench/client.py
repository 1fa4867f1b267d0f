"""The load test's HTTP client: sends one request to an OpenAI-compatible server, and notes when each chunk came.

It shares the machine with the server that it measures, so it does little for each chunk: one typed parse that skips
unused fields. With aiohttp on uvloop a chunk takes 13 µs of CPU in all (32 streams); asyncio's own loop would
double that, httpx would take four times as much.
"""

import json
import time
from typing import Any

import aiohttp
import msgspec

from deployments.bench.figures import Timeline
from deployments.bench.load import Ask, sample_text

_MAX_ERROR_CHARS = 300
_LOOK_TIMEOUT_S = 30.0


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class StreamError(Exception):
    """The answer is no stream of chunks, or contains an error. The request counts as failed."""


class Stream:
    """Splits the bytes of an event stream into chunks, and notes in a timeline when those with a token came."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._rest = b""
        self.is_done = False  # [DONE] came

    def feed(self, data: bytes, now_s: float) -> None:
        """Take bytes as they come. Raises StreamError."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_s)

    def _event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            chunk = _decode(data)
        except msgspec.MsgspecError as error:
            raise StreamError(f"a chunk that cannot be read: {error}") from None
        if chunk.error is not None:
            raise StreamError(f"an error in the stream: {error_words(chunk.error)}")
        chunks_s = self._timeline.chunks_s
        if any(_has_token(choice, not chunks_s or now_s > chunks_s[-1]) for choice in chunk.choices):
            chunks_s.append(now_s)
        if chunk.usage is not None:
            self._timeline.output_tokens = chunk.usage.completion_tokens
            if chunk.usage.prompt_tokens is not None:
                self._timeline.prompt_tokens = chunk.usage.prompt_tokens


def _has_token(choice: _Choice, came_alone: bool) -> bool:
    """A token may have no text (half a character); a chunk that only opens a chat, or ends an answer, has no token.

    Some servers end an answer in its last token's chunk, others in one more that arrives together with it.
    """
    delta = choice.delta
    if choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)):
        return True
    return came_alone if choice.finish_reason else not (delta and delta.role)


class Client:
    """One server, over connections that are kept open. To be used in `async with`."""

    def __init__(self, url: str, key: str | None, timeout_s: float, shared_fields: dict[str, Any]) -> None:
        """`url` without /v1; `timeout_s` is for one whole answer; `shared_fields` go into every body."""
        self.url = url
        self._shared_fields = shared_fields
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def send(self, ask: Ask) -> Timeline:
        """Send a request and read the answer to its end. Any error is recorded in the timeline."""
        body = msgspec.json.encode({**self._shared_fields, **ask.fields})
        timeline = Timeline(time.perf_counter(), prompt_tokens=ask.prompt_tokens)
        try:
            async with self._session.post(self.url + ask.path, data=body) as response:
                if response.status != 200:
                    raise StreamError(f"HTTP {response.status}: {error_words(await response.text(errors='replace'))}")
                stream = Stream(timeline)
                async for data in response.content.iter_any():
                    stream.feed(data, time.perf_counter())
            timeline.error = _what_is_missing(timeline, stream)
        except StreamError as error:
            timeline.error = str(error)
        except TimeoutError:
            timeline.error = f"no end within {self._timeout_s:g} s"
        except aiohttp.ClientPayloadError:
            timeline.error = "the connection broke in the middle of the stream"
        except (aiohttp.ClientError, OSError) as error:
            timeline.error = f"no answer: {connection_words(error)}"
        timeline.ended_s = time.perf_counter() if timeline.error else timeline.chunks_s[-1]
        return timeline

    async def look(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of a route; its text where that is no JSON. Raises OSError or aiohttp.ClientError."""
        timeout = aiohttp.ClientTimeout(total=_LOOK_TIMEOUT_S)
        method = "GET" if body is None else "POST"
        async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
            text = await response.text(errors="replace")
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    async def known_ids(self, model: str) -> list[int] | None:
        """Token ids that the server has by its `/tokenize` (ours and vLLM's); None where there is no such route."""
        body = {"model": model, "prompt": sample_text(), "add_special_tokens": False}
        status, answer = await self.look("/tokenize", body)
        ids = answer.get("tokens") if status == 200 and isinstance(answer, dict) else None
        if not isinstance(ids, list) or not ids or not all(isinstance(one, int) for one in ids):
            return None
        return sorted(set(ids))


def _what_is_missing(timeline: Timeline, stream: Stream) -> str:
    if not stream.is_done:
        return "the stream ended without [DONE]"
    return "" if timeline.chunks_s else "an answer without tokens"


def error_words(error: Any) -> str:
    """The message of an error: of OpenAI's object, as JSON or not, or any text."""
    if isinstance(error, str):
        try:
            error = json.loads(error)
        except ValueError:
            return " ".join(error.split())[:_MAX_ERROR_CHARS] or "no message"
    inner = error.get("error", error) if isinstance(error, dict) else error
    message = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
    return str(message or error)[:_MAX_ERROR_CHARS]


def connection_words(error: BaseException) -> str:
    """Why there is no connection, or none any more."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error.strerror or error.os_error)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection"
    if isinstance(error, TimeoutError):
        return f"nothing came within {_LOOK_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__
