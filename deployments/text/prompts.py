"""Prompts as plain data: a text, token ids, or a conversation; and why a conversation cannot become a text."""

import re
from dataclasses import dataclass

_PRIVATE = re.compile(r"(?:/[\w.@+-]+){2,}/?|0x[0-9a-fA-F]+")  # paths and addresses


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template: dicts with role, content and maybe name, all of them text."""

    messages: list[dict[str, str]]


Prompt = str | list[int] | Conversation


class ConversationError(ValueError):
    """The messages cannot become a text; the message says why, and may be shown to the client (as 400)."""

    def __init__(self, message: str, *, is_too_long: bool = False) -> None:
        """`is_too_long`: fewer messages would do."""
        super().__init__(message)
        self.is_too_long = is_too_long


def public_text(text: str) -> str:
    """The first line of an inner error, without paths and addresses."""
    return _PRIVATE.sub("…", text.strip().partition("\n")[0])
