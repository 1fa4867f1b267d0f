"""The text of one kind, thinking or content, as it is shown: without the white space beside marks."""

_MAX_SPACE = 64  # characters of white space that are held back, because a mark after them would make them go


class TextFlow:
    """Text of one kind. White space beside marks is left out; what a mark parts is parted by a line break."""

    def __init__(self) -> None:
        self.is_after_mark = False
        self._has_begun = False
        self._space = ""  # held back, at the end
        self._shown: list[str] = []

    def push(self, text: str) -> None:
        """Add text."""
        if self.is_after_mark:
            text = text.lstrip()
            self.is_after_mark = not text
            text = "\n" + text if text and self._has_begun else text
        text = self._space + text
        num_shown = max(len(text.rstrip()), len(text) - _MAX_SPACE)
        self._has_begun = self._has_begun or num_shown > 0
        self._shown.append(text[:num_shown])
        self._space = text[num_shown:]

    def mark(self) -> None:
        """Here is a mark."""
        self._space, self.is_after_mark = "", True

    def end(self) -> None:
        """Nothing follows."""
        self._shown.append(self._space)
        self._space = ""

    def take(self) -> str:
        """What may be shown since the last call."""
        shown, self._shown = "".join(self._shown), []
        return shown
