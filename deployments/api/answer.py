"""Answer: one sequence's events become pieces of text, thinking and calls, with what was asked for beside them."""

from collections.abc import Iterator
from dataclasses import dataclass

from actors.words.messages import Event, Request, TokenLogprobs
from deployments.api.metrics import Stopwatch
from deployments.api.response_objects import AnswerEnd
from deployments.api.responses import Piece, ReadPrompt
from deployments.text.response_reader import Delta, ResponseReader
from deployments.text.transcript import Transcript

_INLINE_TOKENS = 64  # of one event; the text of more is read aside from the event loop


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
        num_tokens = len(event.token_ids) + (len(self.request.prompt_ids) if self._echo else 0)
        return num_tokens > _INLINE_TOKENS or (self._reader is not None and self._reader.is_slow)

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
