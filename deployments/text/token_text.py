"""The text and bytes of one token alone, as log-probabilities show it."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenText:
    """The text of one token and its bytes; `raw` is None where the tokenizer does not say which bytes those are."""

    text: str  # bytes that are no whole characters are written as OpenAI does: bytes:\\xe4\\xbd
    raw: list[int] | None


class TokenTexts:
    """Finds the text of token ids, and keeps each for the next time: at most one entry a token of the vocabulary."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        name: Callable[[int], str | None],
        is_byte_level: bool,
        before: list[int],
    ) -> None:
        """`name` gives a token as the vocabulary writes it; `is_byte_level` when each of its characters is a byte.

        `before` are the ids of some ordinary text: decoders drop the space of a token that comes first.
        """
        self._decode = decode
        self._name = name
        self._byte_of = _byte_level_alphabet() if is_byte_level else {}
        self._before = before
        self._known: dict[int, TokenText] = {}

    def of(self, token_id: int) -> TokenText:
        """The text of one id; empty for ids that the tokenizer does not know (vocabularies are padded)."""
        if token_id not in self._known:
            self._known[token_id] = self._look_up(token_id)
        return self._known[token_id]

    def _look_up(self, token_id: int) -> TokenText:
        text, prefix = self._decode([*self._before, token_id]), self._decode(self._before)
        text = text[len(prefix) :] if text.startswith(prefix) else self._decode([token_id])
        if _REPLACEMENT not in text:
            return TokenText(text, list(text.encode()))
        raw = self._raw(self._name(token_id) or "")
        if raw is None:
            return TokenText(text, None)
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    def _raw(self, name: str) -> list[int] | None:
        if match := _BYTE_TOKEN.fullmatch(name):
            return [int(match[1], 16)]
        if name and all(character in self._byte_of for character in name):
            return [self._byte_of[character] for character in name]
        return None


def _byte_level_alphabet() -> dict[str, int]:
    """Character → byte, as GPT-2's tokenizer writes bytes: visible Latin-1 as itself, the others from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
