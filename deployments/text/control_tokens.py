"""Control tokens that clients spell stay text: marked before the chat template runs, and encoded apart behind it."""

from collections.abc import Callable
from typing import Any

from transformers.utils.chat_template_utils import (
    _get_control_token_patterns,
    encode_marked_chat,
    mark_control_tokens,
)

from deployments.text.prompts import ConversationError


class ControlTokens:
    """Those of one tokenizer and chat template: its special tokens, and added ones that the template writes.

    The same ids as Transformers' `apply_chat_template(sanitize_control_tokens=True)`; in one batch, because each call
    holds the interpreter's lock.
    """

    def __init__(
        self, tokenizer: Any, template: str, encode_batch: Callable[[list[str]], list[list[int]]] | None
    ) -> None:
        """`encode_batch` gives the ids of texts, no special tokens added; None: the tokenizer has no such function."""
        self._tokenizer = tokenizer
        self._encode_batch = encode_batch
        self._pattern, _ = _get_control_token_patterns(_control_tokens(tokenizer, template))
        _, self._marked = _get_control_token_patterns(tuple(tokenizer.added_tokens_encoder))
        self._newline_ids = tokenizer.encode("\n", add_special_tokens=False)
        self._ids_as_text: dict[str, list[int]] = {}

    def mark(self, value: Any) -> Any:
        """The value with marks around the control tokens in its texts and keys, at any depth.

        Keys that are identifiers stay as they are, because templates ask for them.
        """
        if isinstance(value, dict):
            return {self._mark_key(key): self.mark(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(one) for one in value]
        return mark_control_tokens(value, self._pattern)

    def _mark_key(self, key: Any) -> Any:
        return key if isinstance(key, str) and key.isidentifier() else mark_control_tokens(key, self._pattern)

    def are_marked(self, text: str) -> bool:
        """Whether the text has marks."""
        return self._marked.search(text) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text with marks. Raises ConversationError for a token that the tokenizer cannot write as text."""
        try:
            if self._encode_batch is None:
                return list(encode_marked_chat(self._tokenizer, text))
            pieces = self._marked.split(text)  # text, token, text, token, …, text; None in place of a lone mark
            plain = iter(self._encode_plain([pieces[0], *filter(None, pieces[2::2])], self._encode_batch))
            ids = list(next(plain))
            for at, piece in enumerate(pieces[1:], start=1):
                if piece:
                    ids += self._as_text(piece) if at % 2 else next(plain)
            return ids
        except ValueError as error:
            raise ConversationError(f"messages: {error}; leave that token out") from None

    def _as_text(self, token: str) -> list[int]:
        if token not in self._ids_as_text:
            encode = self._tokenizer._encode_without_added_tokens  # noqa: SLF001 - it has no other name
            ids = encode("\n" + token)
            num_newline = len(self._newline_ids)
            ids = ids[num_newline:] if ids[:num_newline] == self._newline_ids else encode(token)
            if self._tokenizer.convert_tokens_to_ids(token) in ids:
                raise ValueError(f"{token!r} cannot be written as text")
            self._ids_as_text[token] = ids
        return self._ids_as_text[token]

    def _encode_plain(self, pieces: list[str], encode_batch: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        """Ids of the pieces of a text, the first of which begins it.

        The others are encoded behind a line break, which is taken away again: tokenizers may add a space in front of a
        text. Where the line break melts into what follows, the piece is encoded alone.
        """
        encoded = encode_batch([pieces[0], *("\n" + piece for piece in pieces[1:])])
        num_newline = len(self._newline_ids)
        melted = [at for at, ids in enumerate(encoded) if at and ids[:num_newline] != self._newline_ids]
        encoded = [ids[num_newline:] if at else ids for at, ids in enumerate(encoded)]
        for at, ids in zip(melted, encode_batch([pieces[at] for at in melted]), strict=True):
            encoded[at] = ids
        return encoded


def _control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """As Transformers has it, but without compiling the template here: it is a program, and may not end."""
    asked = tokenizer.chat_control_tokens
    return tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content in asked if asked is not None else token.content in template and not token.content.isspace())
    )
