"""What may become a tool call, from its opening mark on: where it ends, whatever its strings contain."""

import re
from dataclasses import dataclass, field

from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

from deployments.text.tool_calls import PYTHON_CALLS

_MARKS = re.compile(r"""[\\"'\[\]{}()]""")


class _Extent:
    """Where a JSON value or a list of Python calls ends: follows brackets and strings, however the text is cut."""

    def __init__(self, quotes: str) -> None:
        """`quotes`: the characters that begin and end strings."""
        self._quotes = quotes
        self._quote = ""  # of the string that is open
        self._depth = 0
        self._skipped = 0  # characters at the start of the next piece that a backslash covers

    @property
    def is_in_string(self) -> bool:
        """Whether the text so far ends in the middle of a string."""
        return bool(self._quote)

    def push(self, text: str) -> int | None:
        """The index behind the value's last bracket; None where this text does not end it."""
        skipped, self._skipped = self._skipped, 0
        for mark in _MARKS.finditer(text, skipped):
            at, character = mark.start(), mark[0]
            if at < skipped:
                continue
            if self._quote:
                if character == "\\":
                    skipped = at + 2
                elif character == self._quote:
                    self._quote = ""
            elif character in self._quotes:
                self._quote = character
            elif character in "[{(":
                self._depth += 1
            elif character in "]})":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        self._skipped = max(0, skipped - len(text))
        return None


@dataclass
class CallCandidate:
    """It is held back until it has ended, because half a call could not be taken back."""

    field: ResponseTemplateField
    captures: dict[str, str]
    start: int  # of its opening mark, in characters of the answer
    opening: str
    body: list[str] = field(default_factory=list)
    num_chars: int = 0  # of the body
    first_close: int | None = None  # characters of the body up to the end of a closing mark within a string
    is_complete: bool = False  # its brackets are closed

    def __post_init__(self) -> None:
        """Begin to follow the body."""
        self._extent = _Extent(_quotes(self.field))

    def add(self, text: str) -> int | None:
        """More of the body; the index behind its last bracket, the first time that there is one."""
        self.body.append(text)
        self.num_chars += len(text)
        end = None if self.is_complete else self._extent.push(text)
        self.is_complete = self.is_complete or end is not None
        return end

    @property
    def is_in_string(self) -> bool:
        """Whether a closing mark here would be text of an argument."""
        return not self.is_complete and self._extent.is_in_string


def _quotes(call_field: ResponseTemplateField) -> str:
    """Of strings in which closing marks are text."""
    if call_field.content == PYTHON_CALLS:
        return "\"'"
    return '"' if call_field.content == "json" and not call_field.content_args.get("string_delims") else ""
