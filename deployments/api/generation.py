"""Generation: the answers to one HTTP request, from the engine's events to pieces of text."""

import math
import time
from collections.abc import Callable

import msgspec

from actors.remote.engine import Engine
from actors.words.errors import EngineStopped
from actors.words.messages import Event, Request
from deployments.api.answer import Answer
from deployments.api.aside import aside
from deployments.api.errors import ApiError
from deployments.api.outbox import Mailbox, Outbox
from deployments.api.request_log import RequestRecord
from deployments.api.response_objects import CompletionDetails, Usage
from deployments.api.responses import Piece
from deployments.text.prompts import public_text

NOT_READY_RETRY_AFTER_S = 5
PING_S = 5.0  # between two pings of a stream while the gang recovers: proxies drop what is silent for 30 s or more


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
        self._on_first: Callable[[], None] | None = None

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

    def start(self, at_end: bool = False, key: str = "", on_first: Callable[[], None] | None = None) -> None:
        """Hand all requests to the engine. Raises ApiError (503) when it does not serve.

        `key`: the name of the API key whose turn it takes. `on_first` is called when the first piece comes.

        `at_end`: `take` waits until a sequence has ended, and nothing wakes up before; not for stop strings, nor where
        the first call ends the answer: the engine does not know of them.
        """
        self._on_first = on_first
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
        if self._on_first is not None and pieces:
            self._on_first()
            self._on_first = None
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
        piece = await aside(answer.is_slow(event), answer.push, event)
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
    if event.code in ("ends_ranks", "no_grammars"):
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
