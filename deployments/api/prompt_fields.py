"""Prompt fields: `prompt` and `messages` of a request body, parsed into texts, token ids or a conversation."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, model_validator

from deployments.api.errors import shown
from deployments.api.strict_body import Body, only, wrong
from deployments.text.prompts import Conversation, Prompt

MAX_MESSAGES = 2048


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


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "text":
            raise wrong(
                "unsupported_parameter", "{kind} is not supported; send text parts only", kind=shown(data["type"])
            )
        return data


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise wrong("invalid_type", "must be a text or a list of text parts")


class Message(Body):
    """One message. The other fields of OpenAI's answers pass when empty, so that an answer can be sent back whole."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(_parts)]
    name: str | None = None  # handed to the chat template

    refusal: Annotated[object, only()] = None
    audio: Annotated[object, only()] = None
    annotations: Annotated[object, only([])] = None
    function_call: Annotated[object, only()] = None
    tool_calls: Annotated[object, only([])] = None
    reasoning: Annotated[object, only("")] = None
    reasoning_content: Annotated[object, only("")] = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it; several parts are joined by line breaks."""
        message: dict[str, str] = {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        if self.name is not None:
            message["name"] = self.name
        return message


Messages = Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]


def conversation(messages: list[Message]) -> Conversation:
    """The messages as plain data for the chat template."""
    return Conversation([message.for_template() for message in messages])
