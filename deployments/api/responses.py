"""OpenAI's response objects: completions and chats, whole or as chunks of a stream."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from actors.words.messages import FinishReason
from deployments.api.logprobs import ChatLogprobs, CompletionLogprobs, chat_logprobs, completion_logprobs
from deployments.text.token_text import TokenTexts
from deployments.text.transcript import ScoredToken

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Piece:
    """A part of one answer: its new text, and with the last part why it ended."""

    index: int
    text: str
    finish_reason: FinishReason | None
    scored: Sequence[ScoredToken] = ()  # the tokens of this text, where their log-probabilities were asked for

    def joined(self, next_piece: "Piece") -> "Piece":
        """One piece: this one with the next one appended."""
        scored = [*self.scored, *next_piece.scored]
        return Piece(self.index, self.text + next_piece.text, next_piece.finish_reason, scored)


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one request, all its answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None = None


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message, or with `role` or `content` left out what a chunk adds to it."""

    role: str | None = None
    content: str | None = None


class _MessageChoice(msgspec.Struct, frozen=True):
    index: int
    message: _Message
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None


class _DeltaChoice(msgspec.Struct, frozen=True):
    index: int
    delta: _Message
    finish_reason: FinishReason | None = None
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

    def whole(self, answers: list[Piece], usage: Usage) -> bytes:
        """See Reply."""
        choices = [
            _MessageChoice(
                answer.index, _Message("assistant", answer.text), answer.finish_reason, self._logprobs(answer)
            )
            for answer in answers
        ]
        return self._whole(choices, usage)

    def opening(self, index: int) -> bytes:
        """A chunk with the role."""
        return self._event([_DeltaChoice(index, _Message("assistant", ""))])

    def chunk(self, piece: Piece) -> bytes:
        """See Reply."""
        chunk = b""
        if piece.text or piece.scored or not piece.finish_reason:
            logprobs = self._logprobs(piece) if piece.scored else None
            chunk += self._event([_DeltaChoice(piece.index, _Message(content=piece.text), logprobs=logprobs)])
        if piece.finish_reason:
            chunk += self._event([_DeltaChoice(piece.index, _Message(), piece.finish_reason)])
        return chunk

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return None if self._token_texts is None else chat_logprobs(piece.scored, self._token_texts)
