"""The compiler of grammars: hostile ones fail alone, in bounded time, and the next one is served."""

import asyncio
import json
from typing import ClassVar

import pytest

from deployments.text import grammar_compiler
from deployments.text.answer_grammar import Thinking, answer_grammar
from deployments.text.grammar_compiler import GrammarCompiler
from deployments.text.grammar_text import GrammarBusy, GrammarError
from deployments.text.grammars import Grammars
from deployments.text.prompts import ContentRule, Conversation
from deployments.text.response_format import choose_format
from tests.formats.grammars import END, MARKS, TOKENS, VOCAB_SIZE
from tests.serving import is_alive, until

FIELD = "response_format.json_schema.schema"
PLAIN = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def asked(kind, value):
    return answer_grammar(ContentRule(kind, value, FIELD), Conversation([]), None, None, TOKENS)


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.fixture(scope="module")
def compiler():
    compiler = GrammarCompiler(TOKENS, VOCAB_SIZE)
    yield compiler
    compiler.close()


def verdict(compiler, kind, value):
    """What clients are told; None where the grammar can be followed."""
    try:
        asyncio.run(compiler.compile(asked(kind, value)))
    except GrammarError as error:
        assert error.field == FIELD
        assert str(error).startswith(f"{FIELD}: ")
        assert len(str(error)) < 500
        return str(error)


HOSTILE = {
    "a million values": ("json", {"enum": [f"value {at}" for at in range(10**6)]}, "more than 1048576 characters"),
    "a reference to itself": ("json", {"$ref": "#"}, "no text fulfils it"),
    "references in a circle": (
        "json",
        {"$defs": {str(at): {"$ref": f"#/$defs/{(at + 1) % 50}"} for at in range(50)}, "$ref": "#/$defs/0"},
        "no text fulfils it",
    ),
    "a long way down": ("json", nested(400), "recursion limit"),
    "another host": ("json", {"$ref": "http://127.0.0.1/x"}, "does not fetch"),
    "a huge length": ("json", {"type": "string", "maxLength": 2**63}, "cannot be followed"),
    "a search that explodes": ("json", {"type": "string", "pattern": ".*a.{400}", "maxLength": 10**5}, "cannot"),
    "products of unions": (
        "json",
        {"allOf": [{"anyOf": [{"properties": {f"{at}{way}": {}}} for at in "abcdefghij"]} for way in "0123456789"]},
        "too large",
    ),
    "brackets": ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
    "brackets in GBNF": ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "recursion"),
    "no grammar": ("grammar", "}{" * 1000, "cannot be followed"),
    "a rule that leads nowhere": ("grammar", "start: a\na: a", "no text fulfils it"),
    "a token of another model": ("grammar", "start: <|im_end|>", "unknown special token"),
    "a thousand ways to go on": ("json", {"properties": {f"p{at}": {} for at in range(1000)}}, "Current row has"),
    "the same, further down": (
        "json", {"properties": {"a": {"properties": {f"p{at}": {} for at in range(1000)}}}, "required": ["a"]},
        "Current row has"),
    "a look around": ("regex", "(?=a)b", "look-around"),
    "ten megabytes": ("json", {"description": "x" * 10**7}, "more than 1048576 characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_followed_fails_by_itself_and_says_why(compiler, name):
    kind, value, words = HOSTILE[name]
    try:
        told = verdict(compiler, kind, value)
    except GrammarError as error:  # before it is compiled
        told = str(error)
    assert words in told
    assert verdict(compiler, "json", PLAIN) is None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"items": {"not": {}}}}}, '["not"] (at properties.a.items.not)'),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "(at properties.a.uniqueItems)"),
        ({"properties": {"a": {"type": "string", "format": "shoe"}}}, "Unknown format: shoe (at properties.a.format)"),
        ({"anyOf": [{"oneOf": [{"type": "string"}, {"minLength": 3}]}]}, "(at anyOf.0.oneOf)"),
        ({"type": "sheep"}, "Invalid type: sheep"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
    ],
)
def test_a_keyword_that_cannot_be_held_to_is_named_with_its_path(compiler, schema, words):
    assert words in verdict(compiler, "json", schema)


def test_limits_show_behind_a_thought_too(compiler):
    wide = {"properties": {f"p{at}": {} for at in range(1000)}}
    rule, thinking = ContentRule("json", wide, FIELD), Thinking("", "</think>")
    with pytest.raises(GrammarError, match=f"{FIELD}: .*Current row has"):
        asyncio.run(compiler.compile(answer_grammar(rule, Conversation([]), None, thinking, TOKENS)))


@pytest.mark.parametrize("kind", ["regex", "json"])
def test_regular_expressions_that_other_engines_choke_on_are_followed(compiler, kind):
    for pattern in ("(a+)+b", "(a|b|c|d){1,1000}", "((a{1,100}){1,100}){1,100}", "^(([a-z])+.)+[A-Z]([a-z])+$"):
        assert verdict(compiler, kind, pattern if kind == "regex" else {"type": "string", "pattern": pattern}) is None


SLOW = {"type": "integer", "multipleOf": 999_983, "minimum": -(10**18), "maximum": 10**18}


def test_what_takes_too_long_ends_alone_and_nobody_waits_for_it(monkeypatch):
    monkeypatch.setattr(grammar_compiler, "QUICK_CPU_S", 0.1)
    monkeypatch.setattr(grammar_compiler, "SLOW_CPU_S", 1.0)
    monkeypatch.setattr(grammar_compiler, "NICE", 0)  # else it may get no processor on a busy machine
    compiler = GrammarCompiler(TOKENS, VOCAB_SIZE)

    async def beside():
        await compiler.compile(asked("json", PLAIN))
        slow = asyncio.create_task(compiler.compile(asked("json", SLOW)))
        quick = [asked("json", {**PLAIN, "title": str(at)}) for at in range(40)]
        for one in quick:
            await compiler.compile(one)
        was_done_before = slow.done()
        with pytest.raises(GrammarError, match="takes too long"):
            await slow
        pids = [lane._process.pid for lane in compiler._lanes]
        with pytest.raises(GrammarError, match="takes too long"):
            await compiler.compile(asked("json", SLOW))
        assert pids == [lane._process.pid for lane in compiler._lanes], "the verdict is kept"
        await compiler.compile(asked("json", {"title": "afterwards", **PLAIN}))
        return was_done_before

    assert asyncio.run(beside()) is False
    pids = [lane._process.pid for lane in compiler._lanes]
    compiler.close()
    until(lambda: not any(is_alive(pid) for pid in pids if pid))


def test_what_takes_too_much_memory_ends_alone(monkeypatch):
    monkeypatch.setattr(grammar_compiler, "MEMORY_BYTES", 8 * 1024 * 1024)
    compiler = GrammarCompiler(TOKENS, VOCAB_SIZE)
    values = {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(5000)}}
    assert "too much memory" in verdict(compiler, "json", values)
    assert verdict(compiler, "json", {"type": "boolean"}) is None
    compiler.close()


def test_who_would_wait_too_long_is_told_at_once_and_no_schema_is_at_fault(compiler, monkeypatch):
    for lane in compiler._lanes:
        monkeypatch.setattr(lane, "_most_waiting", 0)
    with pytest.raises(GrammarBusy):
        asyncio.run(compiler.compile(asked("json", {"title": "one too many"})))


def test_what_gets_no_processor_is_no_fault_of_the_schema_and_not_kept(compiler, monkeypatch):
    with monkeypatch.context() as patch:
        for lane in compiler._lanes:
            patch.setattr(lane._process, "ask", lambda _: None)
        with pytest.raises(GrammarBusy):
            asyncio.run(compiler.compile(asked("json", {"title": "no processor"})))
    assert verdict(compiler, "json", {"title": "no processor"}) is None


def test_the_loop_goes_on_while_grammars_are_made_and_compiled(compiler):
    schema = {"enum": [f"value {at}" for at in range(3000)]}

    async def watched():
        grammar = asyncio.create_task(compiler.compile(asked("json", schema)))
        turns = 0
        while not grammar.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert asyncio.run(watched()) > 20


def test_a_verdict_is_kept(compiler, monkeypatch):
    assert verdict(compiler, "json", PLAIN) is None
    bad = {"properties": {"kept": {"not": {}}}}
    told = verdict(compiler, "json", bad)
    for lane in compiler._lanes:
        monkeypatch.setattr(lane, "ask", None)
    assert verdict(compiler, "json", PLAIN) is None
    assert verdict(compiler, "json", bad) == told


def test_the_cache_is_bounded(compiler, monkeypatch):
    monkeypatch.setattr(grammar_compiler, "_MAX_CACHED_CHARS", 2000)
    for at in range(5):
        assert verdict(compiler, "json", {"title": f"{at}" * 500}) is None
    kept = [len(json.dumps(answer)) for answer in compiler._cache.values()]
    assert sum(kept) < 3000
    assert len(kept) < 5


class Tokenizer:
    added_tokens_decoder: ClassVar = {}

    def __len__(self):
        return VOCAB_SIZE


@pytest.mark.parametrize(
    ("prompt", "prefix", "has_opens", "has_closes"),
    [
        ("How?", "", False, False),
        (Conversation([]), "", True, True),
        (Conversation([]), "<|channel|>final<|message|>", False, True),
    ],
)
def test_marks_around_content_are_only_for_conversations_that_have_not_written_them(
    prompt, prefix, has_opens, has_closes
):
    grammars = Grammars(Tokenizer(), frozenset({END}))
    harmony = choose_format("harmony", None, MARKS, [], "<|turn|>")
    text = asyncio.run(grammars.of(ContentRule("choice", ["yes"], FIELD), prompt, harmony, prefix))
    grammars.close()
    answer = next(line for line in text.splitlines() if line.startswith("answer"))
    assert ("final" in answer, "return" in answer) == (has_opens, has_closes), text
