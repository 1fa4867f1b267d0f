"""Prompt fields: `prompt` and `messages` of a request body, parsed into texts, token ids or a conversation."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, model_validator

from deployments.api.errors import shown
from deployments.api.foreign_fields import OF_MESSAGES, OF_PARTS
from deployments.api.strict_body import Body, only, wrong
from deployments.api.tool_fields import MAX_CALLS, Call
from deployments.text.prompts import Prompt, content_text

MAX_MESSAGES = 2048
_GO_ON = 'send "continue_final_message": true beside the messages'


def _prompts(value: object) -> list[Prompt]:
    """The prompts in a text, texts, ids or lists of ids. Whether ids are in the vocabulary is checked in service.py."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {str}:
            return list(value)
        if kinds == {list} and all(ids and set(map(type, ids)) == {int} for ids in value):
            return list(value)
    raise wrong("invalid_type", "must be a text, texts, token ids or lists of token ids, and not empty")


Prompts = Annotated[list[Prompt], PlainValidator(_prompts)]


class Part(Body):
    """A part of a message's content: text, under each name that clients have for it, or an assistant's thinking."""

    place: ClassVar[str] = "messages.content."
    foreign: ClassVar[Mapping[str, str]] = OF_PARTS
    type: Literal["text", "input_text", "output_text", "refusal", "thinking"]
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    signature: object = None  # of thinking, by another server

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: object) -> object:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind not in get_args(cls.model_fields["type"].annotation):
            raise wrong("unsupported_parameter", "{kind} is not supported; send text parts only", kind=shown(kind))
        return data

    @model_validator(mode="after")
    def _has_what_it_is(self) -> Self:
        if self.shown is None and (self.type != "thinking" or self.thinking is None):
            raise wrong("missing", "is required", field=self.type.removeprefix("input_").removeprefix("output_"))
        return self

    @property
    def shown(self) -> str | None:
        """Its text; None for thinking."""
        return {"refusal": self.refusal, "thinking": None}.get(self.type, self.text)


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise wrong("invalid_type", "must be a text or a list of text parts")


class Message(Body):
    """One message. The other fields of OpenAI's answers pass when empty, so that an answer can be sent back whole."""

    place: ClassVar[str] = "messages."
    foreign: ClassVar[Mapping[str, str]] = OF_MESSAGES
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part] | None, FailFast(), BeforeValidator(_parts)] = None
    name: str | None = None  # handed to the chat template
    tool_calls: Annotated[list[Call], FailFast(), Field(max_length=MAX_CALLS)] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # the assistant's thinking, under the names that servers have for it
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None  # in place of content

    annotations: object = None  # of an answer, passed back

    audio: Annotated[object, only()] = None
    function_call: Annotated[object, only()] = None
    # Mistral's and DeepSeek's name for a message to go on with, and Qwen's and Kimi's
    prefix: Annotated[object, only(False, instead=_GO_ON)] = None
    partial: Annotated[object, only(False, instead=_GO_ON)] = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: content is a text, parts where there are several, or None."""
        thoughts = [part.thinking for part in self.content or [] if part.thinking is not None]
        parts = [{"type": "text", "text": text} for text in self.texts]
        message: dict[str, Any] = {"role": self.role, "content": parts if len(parts) > 1 else content_text(parts)}
        if not parts:
            message["content"] = None
        reasoning = self.reasoning_content or self.reasoning or self.thinking or "\n".join(thoughts)
        given = {"name": self.name, "tool_call_id": self.tool_call_id}
        given |= {"reasoning_content": reasoning, "reasoning": reasoning}  # Transformers adds the name `thinking`
        message |= {name: value for name, value in given.items() if value}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message

    @property
    def texts(self) -> list[str]:
        """What it says, without thinking."""
        texts = [part.shown for part in self.content or [] if part.shown is not None]
        return texts if texts or self.refusal is None else [self.refusal]

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> Self:
        of_assistant = {
            "tool_calls": self.tool_calls,
            "reasoning_content": self.reasoning_content,
            "reasoning": self.reasoning,
            "thinking": self.thinking,
            "content": [part for part in self.content or [] if part.type == "thinking"],
        }
        wrong_field = next((name for name, value in of_assistant.items() if value), None)
        if self.role != "assistant" and wrong_field:
            words = "has thinking, which is" if wrong_field == "content" else "is"
            raise wrong(
                "invalid_value", "{words} for the role assistant only; leave it out", field=wrong_field, words=words
            )
        if self.role != "tool" and self.tool_call_id is not None:
            raise wrong("invalid_value", "is for the role tool only; leave it out", field="tool_call_id")
        if self.content is None and self.role not in ("tool", "assistant"):
            raise wrong("missing", "is required", field="content")
        return self


Messages = Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]


_OWN_VARIABLES = {
    "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "return_assistant_tokens_mask",
}  # fmt: skip


def _variables(value: object) -> object:
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str) or not name.isidentifier() or name[0] == "_" or name in _OWN_VARIABLES:
                raise wrong("invalid_value", "{name} is none that a request may set; leave it out", name=shown(name))
    return value


Variables = Annotated[dict[str, Any], BeforeValidator(_variables)]
