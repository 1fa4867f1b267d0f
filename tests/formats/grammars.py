"""Grammars without a model: what a matcher accepts of a text, and texts drawn from a grammar at random."""

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from actors.decisions.grammar import LIMITS
from deployments.text.answer_grammar import answer_grammar
from deployments.text.grammar_process import ByteVocabulary, check
from deployments.text.grammar_text import Marks
from deployments.text.prompts import CallRule, Conversation

VOCAB_SIZE = 600
END = 2
MARKS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<seed:tool_call>", "</seed:tool_call>", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>", "<minimax:tool_call>", "</minimax:tool_call>",
    "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>",
    "<|END_RESPONSE|>", "<|action_start|>", "<|plugin|>", "<|action_end|>", "<|channel|>", "<|message|>", "<|start|>",
    "<|constrain|>", "<|call|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<start_function_call>",
    "<end_function_call>", "<escape>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "[TOOL_CALLS]", "[ARGS]",
    "<|tool_call|>", "<|return|>",
]  # fmt: skip
TOKENS = Marks({mark: 300 + at for at, mark in enumerate(MARKS)}, frozenset({END}))  # all marks are control tokens
TEXTS = Marks({}, frozenset({END}))  # no mark is: all are spelled


class Followed:
    """A grammar over bytes and control tokens."""

    def __init__(self, text, marks=TOKENS):
        self.marks = marks
        special = {token_id: mark for mark, token_id in marks.ids.items()}
        self._bytes = ByteVocabulary(VOCAB_SIZE, special, [END])
        self._tokenizer = LLTokenizer(self._bytes)
        request = {"rules": text.render("answer"), "own": text.own_grammar}
        self.answer = check(self._tokenizer, LLParserLimits(**LIMITS), request)
        self.error = self.answer.get("error")

    def matcher(self):
        return LLMatcher(self._tokenizer, self.answer["grammar"], log_level=0)

    def ids(self, text):
        return [
            one for piece in self.marks.split(text) for one in ([piece] if type(piece) is int else self._bytes(piece))
        ]

    def takes(self, text):
        """Whether the whole text is an answer."""
        matcher, ids = self.matcher(), self.ids(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def taken(self, text):
        """How much of a text may begin an answer."""
        ids = self.ids(text)
        num_taken = self.matcher().try_consume_tokens(ids)
        return self.text(ids[:num_taken])

    def text(self, ids):
        tokens = b"".join(self._bytes.tokens[one] for one in ids)
        return tokens.decode(errors="ignore")

    def drawn(self, dice, max_tokens=1500):
        """A text drawn at random, which prefers to end; None where it did not."""
        matcher, ids = self.matcher(), []
        for _ in range(max_tokens):
            if matcher.is_stopped() or (matcher.is_accepting() and dice.random() < 0.3):
                return self.text(ids)
            words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.flatnonzero(np.unpackbits(words, bitorder="little"))
            allowed = [int(one) for one in allowed if one != END]
            closing = [one for one in allowed if self._bytes.tokens[one] in b'"}])>\n' or one >= 300]
            ids.append(dice.choice(closing if closing and dice.random() < 0.5 else allowed))
            assert matcher.consume_token(ids[-1]), (matcher.get_error(), self.text(ids))
        return None


def tools_of(schemas):
    """Tools as chat templates see them."""
    return [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in schemas.items()]


def calls_grammar(form, schemas, marks=TOKENS, content=None, thinking=None, is_single=False, is_loose=False, **rule):
    """The grammar of answers to a request with these tools."""
    conversation = Conversation([], tools_of(schemas), is_single_call=is_single, call_rule=CallRule(**rule))
    return answer_grammar(content, conversation, form, thinking, marks, is_loose)
