"""OpenAI's response objects: completions and chats, whole or as chunks of a stream."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import msgspec

from actors.words.messages import FinishReason
from deployments.api.logprobs import ChatLogprobs, CompletionLogprobs, chat_logprobs, completion_logprobs
from deployments.text.token_text import TokenTexts
from deployments.text.tool_calls import ToolCall
from deployments.text.transcript import ScoredToken

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"

AnswerEnd = FinishReason | Literal["tool_calls"]  # a call was made, and the model stopped


@dataclass(frozen=True)
class Piece:
    """A part of one answer: its new text, and with the last part why it ended."""

    index: int
    text: str
    finish_reason: AnswerEnd | None
    scored: Sequence[ScoredToken] = ()  # the tokens of this piece, where their log-probabilities were asked for
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()

    def joined(self, next_piece: "Piece") -> "Piece":
        """One piece: this one with the next one appended."""
        return Piece(
            self.index,
            self.text + next_piece.text,
            next_piece.finish_reason,
            [*self.scored, *next_piece.scored],
            self.reasoning + next_piece.reasoning,
            [*self.calls, *next_piece.calls],
        )


class CompletionDetails(msgspec.Struct, frozen=True):
    """What the generated tokens were."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token counts of one request, all its answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails | None = None  # of chats


class _TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: AnswerEnd | None
    logprobs: CompletionLogprobs | None = None


class _Function(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str | None = None
    arguments: str | msgspec.UnsetType = msgspec.UNSET


class _Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call, or in a chunk a part of it: the first has all but the arguments, the others have nothing else."""

    index: int | None = None  # in chunks: counts the calls of the answer
    id: str | None = None
    type: str | None = None
    function: _Function = _Function()


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message, or with fields left out what a chunk adds to it."""

    role: str | None = None
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | None = None  # the name that SGLang and llama.cpp have for it
    reasoning: str | None = None  # vLLM's
    tool_calls: list[_Call] | None = None


class _MessageChoice(msgspec.Struct, frozen=True):
    index: int
    message: _Message
    finish_reason: AnswerEnd | None
    logprobs: ChatLogprobs | None = None


class _DeltaChoice(msgspec.Struct, frozen=True):
    index: int
    delta: _Message
    finish_reason: AnswerEnd | None = None
    logprobs: ChatLogprobs | None = None


_Choices = Sequence[_TextChoice | _MessageChoice | _DeltaChoice]


class _Object(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int  # seconds since 1970
    model: str
    choices: _Choices
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class Stamp(NamedTuple):
    """What tells one reply from another. Batch jobs work it out, so that two runs give the same bytes."""

    id: str  # without the prefix of its kind
    created: int  # seconds since 1970


class Reply(Protocol):
    """Writes the answer to one request; the parts of a stream are server-sent events."""

    def whole(self, answers: list[Piece], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""

    def opening(self, index: int) -> bytes:
        """What a stream contains before the first chunk of an answer; may be empty."""

    def chunk(self, piece: Piece) -> bytes:
        """The text of a piece; then, in a chunk of its own, why the answer ended.

        New tokens whose text is held back (half a character, the beginning of a stop string) give a chunk with an empty
        text: clients see that the answer goes on, and measure times between tokens, not characters.
        """

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk when the client asked for the usage."""


class _OpenAIReply:
    """What completions and chats share: every part of an answer has the same id, time and model."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        model: str,
        include_usage: bool = False,
        token_texts: TokenTexts | None = None,
        stamp: Stamp | None = None,
    ) -> None:
        """`include_usage`: all chunks have a usage, which is null except in the last.

        `token_texts`: log-probabilities are shown, with these texts. `stamp`: none: a random id, and now.
        """
        stamp = stamp or Stamp(uuid.uuid4().hex, int(time.time()))
        self._token_texts = token_texts
        self._id = f"{self.id_prefix}-{stamp.id}"
        self._created = stamp.created
        self._model = model
        self._usage: msgspec.UnsetType | None = None if include_usage else msgspec.UNSET

    def usage_chunk(self, usage: Usage) -> bytes:
        """See Reply."""
        return self._event([], usage)

    def _whole(self, choices: _Choices, usage: Usage) -> bytes:
        return _encode(_Object(self._id, self.whole_object, self._created, self._model, choices, usage))

    def _event(self, choices: _Choices, usage: Usage | None = None) -> bytes:
        chunk = _Object(self._id, self.chunk_object, self._created, self._model, choices, usage or self._usage)
        return b"data: " + _encode(chunk) + b"\n\n"


class CompletionReply(_OpenAIReply):
    """The answer to /v1/completions."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, answers: list[Piece], usage: Usage) -> bytes:
        """See Reply."""
        choices = [
            _TextChoice(answer.index, answer.text, answer.finish_reason, self._logprobs(answer)) for answer in answers
        ]
        return self._whole(choices, usage)

    def opening(self, index: int) -> bytes:
        """Empty: a completion begins with its first text."""
        return b""

    def chunk(self, piece: Piece) -> bytes:
        """See Reply."""
        chunk = b""
        if piece.text or piece.scored or not piece.finish_reason:
            logprobs = self._logprobs(piece) if piece.scored else None
            chunk += self._event([_TextChoice(piece.index, piece.text, None, logprobs)])
        if piece.finish_reason:
            chunk += self._event([_TextChoice(piece.index, "", piece.finish_reason)])
        return chunk

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        return None if self._token_texts is None else completion_logprobs(piece.scored, self._token_texts)


class ChatReply(_OpenAIReply):
    """The answer to /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    @cached_property
    def _num_calls(self) -> dict[int, int]:
        """Calls of each answer, in the chunks so far."""
        return {}

    def whole(self, answers: list[Piece], usage: Usage) -> bytes:
        """See Reply."""
        choices = [
            _MessageChoice(answer.index, _message(answer), answer.finish_reason, self._logprobs(answer))
            for answer in answers
        ]
        return self._whole(choices, usage)

    def opening(self, index: int) -> bytes:
        """A chunk with the role."""
        return self._event([_DeltaChoice(index, _Message("assistant", ""))])

    def chunk(self, piece: Piece) -> bytes:
        """See Reply."""
        deltas = list(self._deltas(piece))
        if not deltas and (piece.scored or not piece.finish_reason):
            deltas = [_Message(content="")]
        chunk = b""
        logprobs = self._logprobs(piece) if piece.scored else None
        for delta in deltas:
            chunk += self._event([_DeltaChoice(piece.index, delta, logprobs=logprobs)])
            logprobs = None
        if piece.finish_reason:
            chunk += self._event([_DeltaChoice(piece.index, _Message(), piece.finish_reason)])
        return chunk

    def _deltas(self, piece: Piece) -> Iterator[_Message]:
        """What a piece adds, one kind in each."""
        if piece.reasoning:
            yield _Message(reasoning_content=piece.reasoning, reasoning=piece.reasoning)
        if piece.text:
            yield _Message(content=piece.text)
        for call in piece.calls:
            at = self._num_calls.get(piece.index, 0)
            self._num_calls[piece.index] = at + 1
            yield _Message(tool_calls=[_Call(at, call.id, "function", _Function(call.name, ""))])
            yield _Message(tool_calls=[_Call(at, function=_Function(arguments=call.arguments))])

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return None if self._token_texts is None else chat_logprobs(piece.scored, self._token_texts)


def _message(answer: Piece) -> _Message:
    """A whole answer. Where there are calls and no text, there is no content."""
    calls = [_Call(id=call.id, type="function", function=_Function(call.name, call.arguments)) for call in answer.calls]
    return _Message(
        role="assistant",
        content=answer.text or (None if calls else ""),
        reasoning_content=answer.reasoning or None,
        reasoning=answer.reasoning or None,
        tool_calls=calls or None,
    )
