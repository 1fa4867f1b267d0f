"""Generation: the answers to one HTTP request, from the engine's events to pieces of text."""

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from actors.remote.engine import Engine
from actors.words.errors import EngineStopped
from actors.words.messages import Event, Request, TokenLogprobs
from deployments.api.errors import ApiError
from deployments.api.metrics import Stopwatch
from deployments.api.outbox import Mailbox, Outbox
from deployments.api.request_log import RequestRecord
from deployments.api.response_objects import AnswerEnd, CompletionDetails, Usage
from deployments.api.responses import Piece, ReadPrompt
from deployments.text.prompts import public_text
from deployments.text.response_reader import Delta, ResponseReader
from deployments.text.transcript import Transcript

NOT_READY_RETRY_AFTER_S = 5
_INLINE_TOKENS = 64  # of one event whose text is read for calls and thinking: more are read in another thread
PING_S = 5.0  # between two pings of a stream while the gang recovers: proxies drop what is silent for 30 s or more


@dataclass(frozen=True)
class Echo:
    """Says that the answer begins with the prompt: as the client wrote it, or None where it sent ids."""

    prompt: str | None
    num_logprobs: int | None = None  # of the likeliest tokens beside each; None: none are shown


class Answer:
    """One answer: turns the events of its sequence into pieces of text."""

    def __init__(
        self,
        index: int,
        request: Request,
        transcript: Transcript,
        stopwatch: Stopwatch,
        echo: Echo | None = None,
        reader: ResponseReader | None = None,
        lead: str = "",
        tells_ids: bool = False,
        tells_prompt: bool = False,
    ) -> None:
        """`echo`: the prompt is shown before the answer; None: it is not. `reader`: None where all is text.

        `lead`: text that is shown first. `tells_ids`, `tells_prompt`: what pieces have beside their text.
        """
        self.index = index
        self.request = request
        self.transcript = transcript
        self.stopwatch = stopwatch
        self._echo = echo
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._reader = reader
        self._lead, self._tells_ids, self._tells_prompt = lead, tells_ids, tells_prompt
        self._has_calls = False
        self.num_cached = 0  # prompt tokens that were found in the prefix cache
        self.num_reasoning_tokens: int | None = None if reader is None else 0

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.transcript.finish_reason is not None or (self._reader is not None and self._reader.is_done)

    def is_slow(self, event: Event) -> bool:
        """Whether the event may take milliseconds to read."""
        return self._reader is not None and (self._reader.is_slow or len(event.token_ids) > _INLINE_TOKENS)

    def push(self, event: Event) -> Piece | None:
        """The piece that an event adds; None while the prompt is being computed."""
        self._prompt_logprobs += event.prompt_logprobs
        self.num_cached = max(self.num_cached, event.num_cached)
        if not event.token_ids and not event.finish_reason:
            return None
        num_before = self.transcript.num_tokens
        delta = self._read(event) if self._reader else Delta(self._take_echo() + self._text(event))
        text, self._lead = self._lead + delta.content, ""
        token_ids = event.token_ids[: self.transcript.num_tokens - num_before] if self._tells_ids else ()
        self.stopwatch.tokens(len(event.token_ids))
        if self.is_finished:
            self.stopwatch.end()
        scored = self.transcript.take_scored()
        end, prompt = self.finish_reason, self._take_prompt()
        return Piece(self.index, text, end, scored, delta.reasoning, delta.calls, token_ids, prompt)

    @property
    def finish_reason(self) -> AnswerEnd | None:
        """Why it is finished; None while it is not."""
        if self.is_finished and self._has_calls and self.transcript.finish_reason in (None, "stop"):
            return "tool_calls"
        return self.transcript.finish_reason

    def _text(self, event: Event) -> str:
        return self.transcript.push(event.token_ids, event.finish_reason, event.logprobs)

    def _read(self, event: Event) -> Delta:
        """What the event adds; read token by token, so that it is the same whatever came together."""
        assert self._reader is not None
        assert self.num_reasoning_tokens is not None
        reader, deltas = self._reader, list[Delta]()
        for part in _by_token(event):
            was_thinking = reader.is_thinking
            deltas.append(reader.push(self.transcript.with_specials(self._text(part))))
            self.num_reasoning_tokens += was_thinking and reader.is_thinking
            if self.is_finished:
                deltas.append(reader.end())
                break
        calls = tuple(call for delta in deltas for call in delta.calls)
        self._has_calls = self._has_calls or bool(calls)
        return Delta("".join(one.content for one in deltas), "".join(one.reasoning for one in deltas), calls)

    def _take_echo(self) -> str:
        echo, self._echo = self._echo, None
        if echo is None:
            return ""
        logprobs = None
        if (num_top := echo.num_logprobs) is not None:
            logprobs = [
                TokenLogprobs(one.logprob, one.top_ids[:num_top], one.top_logprobs[:num_top])
                for one in self._prompt_logprobs
            ]
        return self.transcript.echo(echo.prompt, self.request.prompt_ids, logprobs)

    def _take_prompt(self) -> ReadPrompt | None:
        tells_prompt, self._tells_prompt = self._tells_prompt, False
        return ReadPrompt(self.request.prompt_ids, self._prompt_logprobs) if tells_prompt else None


def _by_token(event: Event) -> Iterator[Event]:
    """Events of one token each, the last of which ends where the event does."""
    last = len(event.token_ids) - 1
    for at, token_id in enumerate(event.token_ids[:-1]):
        yield Event(event.request_id, [token_id], logprobs=event.logprobs[at : at + 1])
    yield Event(event.request_id, event.token_ids[-1:], event.finish_reason, logprobs=event.logprobs[max(0, last) :])


class Generation:
    """All answers to one HTTP request."""

    def __init__(
        self, engine: Engine, outbox: Outbox, answers: list[Answer], num_prompt_tokens: int, deadline: float | None
    ) -> None:
        """`num_prompt_tokens`: of all prompts, each counted once however many answers it gets.

        `deadline`: that of the answers' requests, in monotonic seconds; None: they have none.
        """
        self._engine = engine
        self._deadline = deadline
        self._outbox = outbox
        self._answers = {answer.request.request_id: answer for answer in answers}
        self._num_prompt_tokens = num_prompt_tokens
        self._mailbox = Mailbox()

    @property
    def num_answers(self) -> int:
        """How many sequences were asked for."""
        return len(self._answers)

    @property
    def is_finished(self) -> bool:
        """Whether all answers are complete."""
        return all(answer.is_finished for answer in self._answers.values())

    @property
    def usage(self) -> Usage:
        """The token counts so far."""
        num_prompt = self._num_prompt_tokens
        num_generated = sum(answer.transcript.num_tokens for answer in self._answers.values())
        reasoning = [answer.num_reasoning_tokens for answer in self._answers.values()]
        details = None if None in reasoning else CompletionDetails(sum(filter(None, reasoning)))
        return Usage(num_prompt, num_generated, num_prompt + num_generated, details)

    @property
    def requests(self) -> list[Request]:
        """What the engine is asked for, one a sequence."""
        return [answer.request for answer in self._answers.values()]

    def start(self, at_end: bool = False, key: str = "") -> None:
        """Hand all requests to the engine. Raises ApiError (503) when it does not serve.

        `key`: the name of the API key whose turn it takes.

        `at_end`: `take` waits until a sequence has ended, and nothing wakes up before; not for stop strings, nor where
        the first call ends the answer: the engine does not know of them.
        """
        self._mailbox = self._outbox.open(list(self._answers), at_end)
        try:
            for answer in self._answers.values():
                self._engine.add(msgspec.structs.replace(answer.request, key=key))
        except EngineStopped:
            raise not_ready() from None

    def end(self) -> None:
        """End the sequences that are not finished. May be called twice, and before `start`."""
        for request_id, answer in self._answers.items():
            self._outbox.close(request_id)
            if not answer.is_finished:
                self._engine.finish(request_id)

    def tell(self, record: RequestRecord) -> None:
        """Fill in what the log says of this request."""
        usage, answers = self.usage, list(self._answers.values())
        record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        # Each prompt once: its first answer may fill the cache for the others
        cached = {id(answer.request.prompt_ids): answer.num_cached for answer in reversed(answers)}
        record.cached_tokens = sum(cached.values())
        details = usage.completion_tokens_details
        record.reasoning_tokens = None if details is None else details.reasoning_tokens
        record.finish_reasons = [answer.finish_reason for answer in answers]
        waits = [wait for answer in answers if (wait := answer.stopwatch.first_token_s) is not None]
        record.ttft_s = round(min(waits), 6) if waits else None

    async def take(self) -> list[Piece]:
        """Wait for events and return what they add, at most one piece an answer; an empty list when a ping is due.

        Raises ApiError when the engine failed, or the deadline has passed.
        """
        pieces: list[Piece] = []
        while not pieces:
            events = await self._mailbox.take(self._patience_s())
            if events is None and self._left_s() <= 0:
                raise too_late()  # the engine's thread is busy with the recovery, and ends the request later
            if events is None:
                break
            pieces = [piece for event in events if (piece := await self._read(event))]
        return pieces

    async def whole(self) -> list[Piece]:
        """Wait for the end → one piece an answer. Raises ApiError as `take` does."""
        answers = [Piece(index, "", None) for index in range(self.num_answers)]
        while not self.is_finished:
            for piece in await self.take():
                answers[piece.index] = answers[piece.index].joined(piece)
        return answers

    def _patience_s(self) -> float | None:
        """How long to wait for events: None, and so no timer, except while the gang recovers."""
        if self._engine.state != "recovering":
            return None
        return min(PING_S, max(0.0, self._left_s()))

    def _left_s(self) -> float:
        return math.inf if self._deadline is None else self._deadline - time.monotonic()

    async def _read(self, event: Event) -> Piece | None:
        answer = self._answers[event.request_id]
        if event.finish_reason == "timeout":
            raise too_late()
        if event.finish_reason in ("error", "abort"):
            raise _failed(event)
        if answer.is_slow(event):
            piece = await asyncio.get_running_loop().run_in_executor(None, answer.push, event)
        else:
            piece = answer.push(event)
        if answer.is_finished:
            self._outbox.close(event.request_id)
            if event.finish_reason is None:  # a stop string, which the engine does not know of
                self._engine.finish(event.request_id, "stop")
        return piece


def _failed(event: Event) -> ApiError:
    """The engine gave a request up: its own computation failed (500), or the engine could not go on (503)."""
    reason = public_text(event.error or "the request was aborted")
    message = f"the engine could not finish this request: {reason}"
    if event.code == "numerical_error":
        return ApiError(500, message, code="numerical_error")
    if event.code == "grammar_error":
        return ApiError(400, message, code="grammar_error")
    if event.code == "ends_ranks":
        return ApiError(500, message, code="engine_failure")
    return ApiError(503, message, code="engine_failure", retry_after_s=NOT_READY_RETRY_AFTER_S)


def too_late() -> ApiError:
    """504: the deadline has passed."""
    message = "the request was not finished in time; ask for fewer tokens, or for more time where `timeout` was sent"
    return ApiError(504, message, code="timeout")


def draining() -> ApiError:
    """503: the replica finishes what runs and takes no new requests."""
    message = "the server is about to stop and takes no more requests; try again later"
    return ApiError(503, message, code="server_draining", retry_after_s=NOT_READY_RETRY_AFTER_S)


def not_ready() -> ApiError:
    """503: the gang does not serve; it is starting, has failed, or is shutting down."""
    message = "the model is not being served at the moment; try again later"
    return ApiError(503, message, code="not_ready", retry_after_s=NOT_READY_RETRY_AFTER_S)
