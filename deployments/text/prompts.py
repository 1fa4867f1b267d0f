"""Prompts as plain data: a text, token ids, or a conversation; and why a conversation cannot become a text."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

_PRIVATE = re.compile(r"(?:/[\w.@+-]+){2,}/?|0x[0-9a-fA-F]+")  # paths and addresses


@dataclass(frozen=True)
class CallRule:
    """What the calls of an answer are held to, by a grammar."""

    must_call: bool = False
    allowed: frozenset[str] | None = None  # names of the tools that may be called; None: all
    strict: frozenset[str] = frozenset()  # names of the tools whose schema is obeyed, or the request refused


@dataclass(frozen=True)
class ContentRule:
    """What the text of an answer is held to, by a grammar."""

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any  # a JSON Schema · a regular expression · texts · a grammar in Lark's or GBNF's form
    field: str  # of the request, that asked for it


@dataclass(frozen=True)
class Conversation:
    """What a chat template makes a text of."""

    messages: list[dict[str, Any]]  # role; content: a text, text parts or None; maybe name, calls, thinking
    tools: list[dict[str, Any]] = field(default_factory=list)  # as OpenAI has them, for calls in the answer
    variables: dict[str, Any] = field(default_factory=dict)  # further ones of the template, such as enable_thinking
    is_single_call: bool = False  # the answer ends with its first call
    call_rule: CallRule = CallRule()
    documents: list[dict[str, Any]] = field(default_factory=list)  # for templates that read some
    begins_answer: bool = True  # the template writes what an answer begins with
    continues_message: bool = False  # the answer goes on with the last message

    @property
    def has_held_calls(self) -> bool:
        """Whether calls are held to more than that they are read as such."""
        rule = self.call_rule
        return bool(self.tools) and (rule.must_call or rule.allowed is not None or bool(rule.strict))

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
