"""Prompts as plain data: a text, token ids, or a conversation; and why a conversation cannot become a text."""

import re
from dataclasses import dataclass, field
from typing import Any

_PRIVATE = re.compile(r"(?:/[\w.@+-]+){2,}/?|0x[0-9a-fA-F]+")  # paths and addresses


@dataclass(frozen=True)
class Conversation:
    """What a chat template makes a text of."""

    messages: list[dict[str, Any]]  # role; content: a text, text parts or None; maybe name, calls, thinking
    tools: list[dict[str, Any]] = field(default_factory=list)  # as OpenAI has them, for calls in the answer
    variables: dict[str, Any] = field(default_factory=dict)  # further ones of the template, such as enable_thinking
    is_single_call: bool = False  # the answer ends with its first call
    documents: list[dict[str, Any]] = field(default_factory=list)  # for templates that read some
    begins_answer: bool = True  # the template writes what an answer begins with
    continues_message: bool = False  # the answer goes on with the last message

    @property
    def num_calls(self) -> int:
        """Calls that the conversation has already."""
        return sum(len(message.get("tool_calls") or []) for message in self.messages)


def content_text(content: str | list[dict[str, Any]] | None) -> str:
    """A message's content as one text; parts are joined by line breaks."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


Prompt = str | list[int] | Conversation


class ConversationError(ValueError):
    """The messages cannot become a text; the message says why, and may be shown to the client (as 400)."""

    def __init__(self, message: str, *, is_too_long: bool = False, field: str = "messages") -> None:
        """`is_too_long`: fewer messages would do. `field`: of the request, that is at fault."""
        super().__init__(message)
        self.field = field
        self.is_too_long = is_too_long


def public_text(text: str) -> str:
    """The first line of an inner error, without paths and addresses."""
    return _PRIVATE.sub("…", text.strip().partition("\n")[0])
