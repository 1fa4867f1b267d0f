"""OpenAI's objects as they are written: choices, messages, chunks. Fields that are not set are left out."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from actors.words.messages import FinishReason
from deployments.api.logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprobs

AnswerEnd = FinishReason | Literal["tool_calls"]  # a call was made, and the model stopped
Ids = Sequence[int] | msgspec.UnsetType  # set where `return_token_ids` asks for them
Prompts = PromptLogprobs | msgspec.UnsetType


class CompletionDetails(msgspec.Struct, frozen=True):
    """What the generated tokens were."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token counts of one request, all its answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails | None = None  # of chats


class TextChoice(msgspec.Struct, frozen=True):
    """One answer of a completion, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: AnswerEnd | None
    logprobs: CompletionLogprobs | None = None
    token_ids: Ids = msgspec.UNSET
    prompt_token_ids: Ids = msgspec.UNSET
    prompt_logprobs: Prompts = msgspec.UNSET


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is called."""

    name: str | None = None
    arguments: str | msgspec.UnsetType = msgspec.UNSET


class Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call, or in a chunk a part of it: the first has all but the arguments, the others have nothing else."""

    index: int | None = None  # in chunks: counts the calls of the answer
    id: str | None = None
    type: str | None = None
    function: Function = Function()


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message, or with fields left out what a chunk adds to it."""

    role: str | None = None
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | None = None  # the name that SGLang and llama.cpp have for it
    reasoning: str | None = None  # vLLM's
    tool_calls: list[Call] | None = None


class MessageChoice(msgspec.Struct, frozen=True):
    """One answer of a chat."""

    index: int
    message: Message
    finish_reason: AnswerEnd | None
    logprobs: ChatLogprobs | None = None
    token_ids: Ids = msgspec.UNSET


class DeltaChoice(msgspec.Struct, frozen=True):
    """What a chunk adds to one answer of a chat."""

    index: int
    delta: Message
    finish_reason: AnswerEnd | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: Ids = msgspec.UNSET


Choices = Sequence[TextChoice | MessageChoice | DeltaChoice]


class ResponseObject(msgspec.Struct, frozen=True):
    """A whole response, or a chunk of one."""

    id: str
    object: str
    created: int  # seconds since 1970
    model: str
    choices: Choices
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: Ids = msgspec.UNSET  # of chats
    prompt_logprobs: Prompts = msgspec.UNSET
