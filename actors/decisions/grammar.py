"""Follows texts through their grammars, by llguidance: which ids may come next, and whether the text may end."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

# Counted in steps of the parser, never in seconds: a grammar is refused everywhere or nowhere, and fails at the same id
# on every shard. Where an expression makes states of nearly every text, the fuel ends a mask after some 3 ms, and the
# text after some 50 ids, before its states take 10 MB. A string with a maxLength needs 10 states a character.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 30_000,
    "step_max_items": 10_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,  # they would quote the grammar
}


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or a text that is not of it, or a limit that was reached."""


def make_vocabulary(tokenizer_json: str, num_ids: int, eos_ids: Sequence[int]) -> LLTokenizer:
    """The bytes of all ids, from the text of a tokenizer.json. It holds the interpreter's lock: 1 s for 128,000 ids.

    `num_ids`: how many the model has; those that the tokenizer does not know are never allowed. `eos_ids` are no text.
    """
    keys: dict[str, Any] = {"eos_token": list(eos_ids)} if eos_ids else {}
    try:
        return LLTokenizer(tokenizer_json, n_vocab=num_ids, **keys)
    except ValueError:  # the tokenizer knows more ids than the model
        return LLTokenizer(tokenizer_json, **keys)


def compiled(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """A grammar in llguidance's JSON or Lark form, ready to follow a text. Raises GrammarError. Releases the lock."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher


class GrammarMatcher:
    """Follows the ids of one text. One thread at a time."""

    def __init__(self, vocabulary: LLTokenizer, grammar: str | LLMatcher, end_ids: Sequence[int]) -> None:
        """`grammar`: or what `compiled` made of it, which is copied. Raises GrammarError.

        `end_ids` end a text: each may come where the text is whole, whatever else may.
        """
        self._matcher = compiled(vocabulary, grammar) if isinstance(grammar, str) else grammar.deep_copy()
        self._words = np.zeros(-(-vocabulary.vocab_size // 32), dtype=np.int32)
        self._end_ids = frozenset(end_id for end_id in end_ids if end_id < vocabulary.vocab_size)
        self._foreign_eos = [eos_id for eos_id in vocabulary.eos_tokens if eos_id not in self._end_ids]
        self._has_ended = False

    def follow(self, ids: Sequence[int]) -> None:
        """Go on by the next ids of the text. Raises GrammarError when one is not allowed, or a limit is reached."""
        self._has_ended = self._has_ended or not self._end_ids.isdisjoint(ids)
        if not self._has_ended and not self._matcher.consume_tokens(list(ids)):
            raise GrammarError(self._matcher.get_error())

    def allowed(self) -> NDArray[np.uint8]:
        """Which ids may come next: bit i % 8 of byte i // 8. The next call overwrites it. Raises GrammarError.

        When the text can only end, these are the end ids. Releases the interpreter's lock.
        """
        words = self._words
        words[:] = 0
        if not self._has_ended:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._matcher.is_error():
                raise GrammarError(self._matcher.get_error())
        allowed = words.view(np.uint8)
        for eos_id in self._foreign_eos:  # the vocabulary's own, with which llguidance would end the text
            allowed[eos_id // 8] &= 0xFF ^ (1 << eos_id % 8)
        if self._has_ended or self._matcher.is_accepting():
            for end_id in self._end_ids:
                allowed[end_id // 8] |= 1 << end_id % 8
        return allowed
