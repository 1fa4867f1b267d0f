"""Where a JSON value or a list of Python calls ends: brackets and strings, followed piece by piece."""

import re

_MARKS = re.compile(r"""[\\"'\[\]{}()]""")


class Extent:
    """Follows a text from the start of its value; linear, however the text is cut."""

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
