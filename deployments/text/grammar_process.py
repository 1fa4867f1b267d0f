"""The worker that compiles grammars, in a limited process: a grammar in, whether it can be followed out.

It compiles as the ranks do, but over a vocabulary of single bytes and the model's control tokens, so that it starts in
a moment whatever the model. See limited_program.py and grammar_compiler.py.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

_MAX_ERROR_CHARS = 400
_MAX_LOOKS = 16  # at what may come next, of each grammar
_OPENINGS = b'{[":'  # with which JSON goes down
_JSON_RULE = re.compile(r"(r\d+): (?=%json )")  # stands by itself


class ByteVocabulary(TokenizerWrapper):
    """A tokenizer for llguidance: the model's control tokens under their own ids, single bytes under others."""

    is_tokenizer_wrapper = True  # what llguidance asks for, beside the tokens

    def __init__(self, vocab_size: int, special: dict[int, str], ends: list[int]) -> None:
        """`vocab_size` ids, more than 255 of which are not among `special`; `ends`: those that end an answer."""
        self.tokens = [b""] * vocab_size
        self.bos_token_id = None
        for token_id, text in special.items():
            self.tokens[token_id] = text.encode()
        free = (token_id for token_id in range(vocab_size) if token_id not in special and token_id not in ends)
        self._ids = [
            next(free) for _ in range(255)
        ]  # no text has the byte 255, with which llguidance marks control tokens
        for byte, token_id in enumerate(self._ids):
            self.tokens[token_id] = bytes([byte])
        self.eos_token_id = ends[0] if ends else next(free)
        self.special_token_ids = sorted({*special, self.eos_token_id})

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text, a byte each."""
        return [self._ids[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """See limited_program.py. `setup`: vocab_size, special tokens as [id, text] each, ends, and llguidance's limits."""
    tokenizer = LLTokenizer(ByteVocabulary(setup["vocab_size"], dict(setup["special"]), setup["ends"]))
    limits = LLParserLimits(**setup["limits"])
    return lambda request: check(tokenizer, limits, request)


def check(tokenizer: LLTokenizer, limits: LLParserLimits, request: dict[str, Any]) -> object:
    """`{"grammar"}`, the text that the ranks get, or why there is none: `{"error", "is_own"}`.

    `request`: the rules, and where they call it the client's own grammar in Lark's or GBNF's form (else null).
    """
    text, own = request["rules"], request["own"]
    if own is not None:
        try:
            lark = any_to_lark(own)
        except Exception as error:  # noqa: BLE001 - a converter without errors of its own
            return {"error": str(error)[:_MAX_ERROR_CHARS], "is_own": True}
        if reason := _why_not(tokenizer, limits, lark):
            return {"error": reason, "is_own": True}
        grammars = [{"name": "rules", "lark_grammar": text}, {"name": "own", "lark_grammar": lark}]
        text = json.dumps({"grammars": grammars})
    reason = _why_not(tokenizer, limits, text) or _why_no_json(tokenizer, limits, request["rules"])
    return {"error": reason, "is_own": False} if reason else {"grammar": text}


def _why_no_json(tokenizer: LLTokenizer, limits: LLParserLimits, rules: str) -> str:
    """Why a schema among the rules cannot be followed, wherever in a text it begins; empty where all can."""
    for line, rule in enumerate(rules.splitlines(), 1):
        found = _JSON_RULE.match(rule)
        if found is None or rules.endswith(f"\nanswer: {found[1]}"):  # the whole was looked at
            continue
        if reason := _why_not(tokenizer, limits, f"start: {rule[found.end() :]}"):
            return f"at {line}(1): {reason}"
    return ""


def _why_not(tokenizer: LLTokenizer, limits: LLParserLimits, grammar: str) -> str:
    """Why it cannot be followed where a text goes straight into it; empty where it can."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    for _ in range(_MAX_LOOKS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        ahead = matcher.compute_ff_tokens() if mask else []
        if not ahead:
            ahead = [one for one in tokenizer.tokenize_bytes(_OPENINGS) if mask[one // 8] >> one % 8 & 1][:1]
        if not ahead or not matcher.consume_tokens(ahead):
            break
    return matcher.get_error()[:_MAX_ERROR_CHARS]
