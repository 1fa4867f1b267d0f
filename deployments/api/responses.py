"""OpenAI's response objects: completions and chats, whole or as chunks of a stream."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import msgspec

from actors.words.messages import TokenLogprobs
from deployments.api.bodies import ChatBody, GenerationBody
from deployments.api.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    NamedById,
    Names,
    PromptLogprobs,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from deployments.api.response_objects import (
    AnswerEnd,
    Call,
    Choices,
    DeltaChoice,
    Function,
    Ids,
    Message,
    MessageChoice,
    ResponseObject,
    TextChoice,
    Usage,
)
from deployments.text.token_text import TokenTexts
from deployments.text.tool_calls import ToolCall
from deployments.text.transcript import ScoredToken

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class ReadPrompt(NamedTuple):
    """What an answer began from."""

    ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]  # of the second id and on; empty where nobody asked


@dataclass(frozen=True)
class Piece:
    """A part of one answer: its new text, and with the last part why it ended."""

    index: int
    text: str
    finish_reason: AnswerEnd | None
    scored: Sequence[ScoredToken] = ()  # the tokens of this piece, where their log-probabilities were asked for
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()
    token_ids: Sequence[int] = ()  # new ones, all that were generated, where they were asked for
    prompt: ReadPrompt | None = None  # with the first piece, where it was asked for

    def joined(self, next_piece: "Piece") -> "Piece":
        """One piece: this one with the next one appended."""
        return replace(
            self,
            text=self.text + next_piece.text,
            finish_reason=next_piece.finish_reason,
            scored=[*self.scored, *next_piece.scored],
            reasoning=self.reasoning + next_piece.reasoning,
            calls=[*self.calls, *next_piece.calls],
            token_ids=[*self.token_ids, *next_piece.token_ids],
            prompt=self.prompt or next_piece.prompt,
        )


class Stamp(NamedTuple):
    """What tells one reply from another. Batch jobs work it out, so that two runs give the same bytes."""

    id: str  # without the prefix of its kind
    created: int  # seconds since 1970


class Reply(Protocol):
    """Writes the answer to one request; the parts of a stream are server-sent events."""

    def whole(self, answers: list[Piece], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""

    def opening(self, index: int, prompt: ReadPrompt | None) -> bytes:
        """What a stream contains before the first chunk of an answer; may be empty."""

    def note(self, usage: Usage) -> None:
        """What the next chunks say of the usage so far."""

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

    def __init__(self, body: GenerationBody, token_texts: TokenTexts, stamp: Stamp | None = None) -> None:
        """`token_texts`: for log-probabilities. `stamp`: none: the request's own id, or a random one, and now."""
        stamp = stamp or Stamp(body.request_id or uuid.uuid4().hex, int(time.time()))
        self._body = body
        self._texts = token_texts
        self._names: Names = NamedById(token_texts) if body.return_tokens_as_token_ids else token_texts
        self._id = f"{self.id_prefix}-{stamp.id}"
        self._created = stamp.created
        # With include_usage all chunks have a usage, which is null except in the last
        self._usage: Usage | msgspec.UnsetType | None = None if body.include_usage else msgspec.UNSET

    def usage_chunk(self, usage: Usage) -> bytes:
        """See Reply."""
        self._usage = usage
        return self._event([])

    def note(self, usage: Usage) -> None:
        """See Reply."""
        self._usage = usage

    def _object(self, kind: str, choices: Choices) -> ResponseObject:
        return ResponseObject(self._id, kind, self._created, self._body.model, choices, self._usage)

    def _event(self, choices: Choices) -> bytes:
        return _event(self._object(self.chunk_object, choices))

    def _ids(self, token_ids: Sequence[int]) -> Ids:
        return token_ids if self._body.return_token_ids else msgspec.UNSET

    def _prompt_ids(self, prompt: ReadPrompt | None) -> Ids:
        return msgspec.UNSET if prompt is None else self._ids(prompt.ids)

    def _prompt_logprobs(self, prompt: ReadPrompt | None) -> PromptLogprobs | msgspec.UnsetType:
        num_top = self._body.prompt_logprobs
        if prompt is None or num_top is None:
            return msgspec.UNSET
        return prompt_logprobs(prompt.ids, prompt.logprobs, num_top, self._texts)


def _event(value: ResponseObject) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


class CompletionReply(_OpenAIReply):
    """The answer to /v1/completions."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, answers: list[Piece], usage: Usage) -> bytes:
        """See Reply."""
        self._usage = usage
        choices = [self._choice(answer, answer.finish_reason) for answer in answers]
        return _encode(self._object(self.whole_object, choices))

    def opening(self, index: int, prompt: ReadPrompt | None) -> bytes:
        """Empty: a completion begins with its first text."""
        return b""

    def chunk(self, piece: Piece) -> bytes:
        """See Reply."""
        chunk = b""
        if piece.text or piece.scored or piece.token_ids or piece.prompt or not piece.finish_reason:
            chunk += self._event([self._choice(piece, None)])
        if piece.finish_reason:
            chunk += self._event([TextChoice(piece.index, "", piece.finish_reason)])
        return chunk

    def _choice(self, piece: Piece, finish_reason: AnswerEnd | None) -> TextChoice:
        is_chunk = finish_reason is None
        return TextChoice(
            piece.index,
            piece.text,
            finish_reason,
            self._logprobs(piece) if piece.scored or not is_chunk else None,
            self._ids(piece.token_ids),
            self._prompt_ids(piece.prompt),
            self._prompt_logprobs(piece.prompt),
        )

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        return None if self._body.num_logprobs is None else completion_logprobs(piece.scored, self._names)


class ChatReply(_OpenAIReply):
    """The answer to /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: GenerationBody, token_texts: TokenTexts, stamp: Stamp | None = None) -> None:
        """See _OpenAIReply."""
        super().__init__(body, token_texts, stamp)
        assert isinstance(body, ChatBody)
        self._role, self._shows_reasoning = body.answer_role, body.include_reasoning
        self._num_calls: dict[int, int] = {}  # of each answer, in the chunks so far

    def whole(self, answers: list[Piece], usage: Usage) -> bytes:
        """See Reply."""
        self._usage = usage
        choices = [
            MessageChoice(
                answer.index,
                self._message(answer),
                answer.finish_reason,
                self._logprobs(answer),
                self._ids(answer.token_ids),
            )
            for answer in answers
        ]
        prompt = answers[0].prompt
        whole = self._object(self.whole_object, choices)
        shown = {"prompt_token_ids": self._prompt_ids(prompt), "prompt_logprobs": self._prompt_logprobs(prompt)}
        return _encode(msgspec.structs.replace(whole, **shown))

    def opening(self, index: int, prompt: ReadPrompt | None) -> bytes:
        """A chunk with the role, and the first one with the prompt's ids."""
        chunk = self._object(self.chunk_object, [DeltaChoice(index, Message(self._role, ""))])
        shown = self._prompt_ids(prompt) if index == 0 else msgspec.UNSET
        return _event(msgspec.structs.replace(chunk, prompt_token_ids=shown))

    def chunk(self, piece: Piece) -> bytes:
        """See Reply."""
        deltas = list(self._deltas(piece))
        if not deltas and (piece.scored or piece.token_ids or not piece.finish_reason):
            deltas = [Message(content="")]
        chunk = b""
        logprobs, token_ids = self._logprobs(piece) if piece.scored else None, piece.token_ids
        for delta in deltas:
            choice = DeltaChoice(piece.index, delta, logprobs=logprobs, token_ids=self._ids(token_ids))
            chunk += self._event([choice])
            logprobs, token_ids = None, ()
        if piece.finish_reason:
            chunk += self._event([DeltaChoice(piece.index, Message(), piece.finish_reason)])
        return chunk

    def _deltas(self, piece: Piece) -> Iterator[Message]:
        """What a piece adds, one kind in each."""
        if piece.reasoning and self._shows_reasoning:
            yield Message(reasoning_content=piece.reasoning, reasoning=piece.reasoning)
        if piece.text:
            yield Message(content=piece.text)
        for call in piece.calls:
            at = self._num_calls.get(piece.index, 0)
            self._num_calls[piece.index] = at + 1
            yield Message(tool_calls=[Call(at, call.id, "function", Function(call.name, ""))])
            yield Message(tool_calls=[Call(at, function=Function(arguments=call.arguments))])

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return None if self._body.num_logprobs is None else chat_logprobs(piece.scored, self._names)

    def _message(self, answer: Piece) -> Message:
        """A whole answer. Where there are calls and no text, there is no content."""
        functions = [(call.id, Function(call.name, call.arguments)) for call in answer.calls]
        calls = [Call(id=call_id, type="function", function=function) for call_id, function in functions]
        reasoning = (answer.reasoning or None) if self._shows_reasoning else None
        return Message(
            role=self._role,
            content=answer.text or (None if calls else ""),
            reasoning_content=reasoning,
            reasoning=reasoning,
            tool_calls=calls or None,
        )


def reply_to(body: GenerationBody, token_texts: TokenTexts, stamp: Stamp | None = None) -> Reply:
    """What writes the answer to a request; see _OpenAIReply."""
    kind = ChatReply if isinstance(body, ChatBody) else CompletionReply
    return kind(body, token_texts, stamp)
