"""Grammars of answers: every family's calls are taken, wrong ones are not, and what is drawn at random reads right."""

import json
import random

import jsonschema
import pytest

from deployments.text.answer_grammar import Thinking
from deployments.text.call_forms import FORMS, form_of
from deployments.text.grammar_text import GrammarError
from deployments.text.prompts import ContentRule
from tests.formats.grammars import TEXTS, TOKENS, Followed, calls_grammar
from tests.formats.writers import FAMILIES, TOOLS, some_calls
from tests.pure.test_response_reader import joined, make_reader

# families that write as the form of their format does; others are read, but not asked for
HINTS = {"DeepSeek V3": "```json", "Mistral v11": "[CALL_ID]"}  # what tells the version in a chat template
WRITERS = [
    "Qwen3", "Hermes without line breaks", "Qwen3-Coder", "Seed-OSS", "GLM 4.5", "GLM 4.7", "MiniMax M2",
    "DeepSeek V3.2", "DeepSeek V3", "DeepSeek V3.1", "Kimi K2", "Mistral v3", "Mistral v11", "Mistral v13",
    "Llama 3.1", "gpt-oss", "Gemma 4", "FunctionGemma", "Granite 3", "Granite 20B", "Phi-4-mini", "Jamba",
    "Nemotron 2", "InternLM 2.5", "LongCat",
]  # fmt: skip
# one of each mechanism; the whole table is the soak
CORNERS = ["hermes", "qwen3_coder", "glm4", "deepseek_dsml", "kimi_k2", "cohere", "llama3_json", "olmo3", "gemma4"]
NUM_DRAWN = 4


def tools_for(name):
    has_dashes = all(family.has_dashes for family in FAMILIES.values() if family.format == name)
    return {tool: schema for tool, schema in TOOLS.items() if has_dashes or "-" not in tool}


def ordered(calls):
    """With arguments in the order of their schema, as a grammar has them."""
    return [(name, {key: given[key] for key in TOOLS[name]["properties"] if key in given}) for name, given in calls]


def read(name, text, tools=TOOLS):
    reader = make_reader(name, tools=tools)
    return joined([reader.push([(text, False)]), reader.end()])


@pytest.mark.parametrize("family", WRITERS)
def test_calls_as_a_family_writes_them_are_taken_and_broken_ones_are_not(family):
    one = FAMILIES[family]
    dice = random.Random(family)
    for marks in (TOKENS, TEXTS):
        grammar = Followed(
            calls_grammar(form_of(one.format, HINTS.get(family, "")), TOOLS, marks, must_call=True), marks
        )
        for count in (1, 2, 3):
            text = one.write(ordered(some_calls(dice, count)))
            assert grammar.takes(text), (grammar.error, text, grammar.taken(text))
        assert not grammar.takes("")
        assert not grammar.takes("I'd rather not.")
        for wrong in (one.write([("nobody", {})]), one.write([("get_weather", {"days": "three"})])):
            assert not grammar.takes(wrong), wrong


def drawn_calls_are_right(name, count):
    form, tools = form_of(name, ""), tools_for(name)
    for marks in (TOKENS, TEXTS):
        grammar = Followed(calls_grammar(form, tools, marks, must_call=True), marks)
        texts = [grammar.drawn(random.Random(f"{name} {at}")) for at in range(count)]
        for text in filter(None, texts):
            content, reasoning, calls = read(name, text)
            assert (content.strip(), reasoning, bool(calls)) == ("", "", True), text
            for tool, arguments in calls:
                jsonschema.validate(arguments, {"type": "object", **TOOLS[tool]})
        assert any(texts)


@pytest.mark.parametrize("name", CORNERS)
def test_what_is_drawn_from_a_grammar_is_read_as_calls_that_obey_their_schemas(name):
    drawn_calls_are_right(name, NUM_DRAWN)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FORMS)
def test_what_is_drawn_from_any_grammar_is_read_as_calls(name):
    drawn_calls_are_right(name, 40)


@pytest.mark.parametrize("name", FORMS)
def test_named_and_single_calls_and_strict_tools_in_every_form(name):
    form, tools = form_of(name, ""), {"now": NOTHING, "f": STRICT}
    for marks in (TOKENS, TEXTS):
        one = Followed(
            calls_grammar(form, tools, marks, must_call=True, allowed=frozenset({"now"}), is_single=True), marks
        )
        text = one.drawn(random.Random(name))
        assert read(name, text, tools)[2] == [("now", {})]
        assert not one.takes(text + text)
        auto = Followed(calls_grammar(form, tools, marks, strict=frozenset({"f"})), marks)
        assert auto.takes(form.content[0] + "Let me see." + form.content[1])
        assert auto.takes(text)
        either = Followed(
            calls_grammar(form, tools, marks, ContentRule("choice", ["yes"], "x"), strict=frozenset({"f"})), marks
        )
        assert either.takes(text)
        assert either.takes(form.content[0] + "yes" + form.content[1])
        assert not either.takes(form.content[0] + "no" + form.content[1])


NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
STRICT = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}},
    "required": ["unit"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("hermes", '{"name": "f", "arguments": {"unit": "C"}}', '{"name": "f", "arguments": {"unit": "K"}}'),
        ("qwen3_coder", "<function=f>\n<parameter=unit>\nF\n</parameter>\n</function>", "<function=f>\n</function>"),
        ("glm4", "f\n<arg_key>unit</arg_key>\n<arg_value>C</arg_value>\n", "f\n<arg_key>days</arg_key>"),
        ("gemma4", 'call:f{unit:<|"|>C<|"|>,days:3}', "call:f{days:3}"),
    ],
)
@pytest.mark.parametrize("marks", [TOKENS, TEXTS])
def test_strict_calls_among_text(name, right, wrong, marks):
    grammar = Followed(calls_grammar(form_of(name, ""), {"f": STRICT}, marks, strict=frozenset({"f"})), marks)
    written = FORMS[name].call
    opens = written.partition("%LF")[0].partition("\n")[0].partition("%NAME")[0].partition("call:")[0]
    closes = written[written.rindex("<") :]
    call = f"{opens}\n{right}\n{closes}" if name in ("hermes", "qwen3_coder") else f"{opens}{right}{closes}"
    for text in (call, f"I look. {call}", f"{call}\nand {call} done <b>", "nothing", ""):
        assert grammar.takes(text), (text, grammar.taken(text))
    for text in (call.replace(right, wrong), f"I look. {call.replace(right, wrong)}"):
        assert not grammar.takes(text)
    if name == "qwen3_coder":  # read as a call without the outer tag, too
        assert not grammar.takes(wrong)


@pytest.mark.parametrize("marks", [TOKENS, TEXTS])
def test_thinking_is_free_until_it_ends_and_then_the_schema_holds(marks):
    rule = ContentRule("json", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}, "f")
    opened, may = (
        Followed(calls_grammar(None, {}, marks, rule, Thinking(opens, "</think>")), marks) for opens in ("", "<think>")
    )
    none = Followed(calls_grammar(None, {}, marks, rule), marks)
    thought = 'Is it {"y"}? <b>\n\n'
    assert opened.takes(thought + '</think>\n\n{"x": 1}')
    assert opened.takes('</think>{"x": 1}')
    assert not opened.takes(thought + "</think>no")
    assert not opened.takes('{"x": 1}')
    assert may.takes(f'<think>{thought}</think>\n\n{{"x": 1}}')
    assert may.takes('{"x": 1}')
    assert not may.takes(f"<think>{thought}</think>no")
    assert none.takes('{"x": 1}')
    assert not none.takes(f'<think>{thought}</think>{{"x": 1}}')


def test_control_tokens_are_no_text_of_strings():
    grammar = Followed(calls_grammar(None, {}, content=ContentRule("json", {"type": "string"}, "f")))
    assert grammar.takes('"plain"')
    assert grammar.taken('"a</think>"') == '"a'
    plain = Followed(calls_grammar(None, {}, TEXTS, ContentRule("json", {"type": "string"}, "f")), TEXTS)
    assert plain.takes('"a</think>"')


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        ("regex", r"\d{3}/[a-z]+", ["123/ab"], ["12/ab", "123/", ""]),
        ("regex", "a|b", ["a", "b"], ["ab"]),
        ("choice", ["yes", 'a "b"\n', "yes, sir", "日本"], ["yes", 'a "b"\n', "yes, sir", "日本"], ["no", "yes,"]),
        ("grammar", 'start: "x" NUM\nNUM: /[0-9]+/', ["x12"], ["x", "y1"]),
        ("grammar", 'root ::= "x" num\nnum ::= [0-9]+', ["x12"], ["x", "y1"]),
        ("json", {"type": "array", "items": {"type": "boolean"}}, ["[true, false]", "[]"], ["[1]", "{}"]),
        ("json", {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "type": "object"}}, "$ref": "#/$defs/n"},
         ['{"n": {"n": {}}}'], ['{"n": 1}']),
    ],
)  # fmt: skip
def test_what_the_text_may_be(kind, value, right, wrong):
    grammar = Followed(calls_grammar(None, {}, content=ContentRule(kind, value, "f")))
    assert grammar.error is None
    assert [text for text in right if not grammar.takes(text)] == []
    assert [text for text in wrong if grammar.takes(text)] == []
    behind = Followed(calls_grammar(None, {}, content=ContentRule(kind, value, "f"), thinking=Thinking("", "</think>")))
    assert behind.takes(f"Hm.</think>\n\n{right[0]}")


def test_blanks_within_json_are_bounded():
    grammar = Followed(calls_grammar(None, {}, content=ContentRule("json", {"type": "object"}, "f")))
    assert grammar.takes('{\n    "a": 1\n}')
    assert len(grammar.taken("{" + " " * 100)) < 40


NAMES = {"json": "hermes", "tags": "qwen3_coder", "gemma": "gemma4", "python": "olmo3"}


@pytest.mark.parametrize("dialect", NAMES)
@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"enum": ["x", "y z"]}}}, {"a": "y z"}),
        ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "object", "properties": {
            "b": {"$ref": "#/$defs/A"}, "n": {"type": "integer"}}}}}, {"a": {"b": {"n": 1}}}),
        ({"properties": {"a": {"type": ["integer", "null"]}, "b": {"type": "boolean"}}}, {"a": None, "b": True}),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}, {"a": None}),
        ({"properties": {"a": {"type": "array", "items": {"type": "string"}, "minItems": 1}}}, {"a": ["x", "y"]}),
        ({"properties": {"a": {"const": 5}, "b": {"type": "number"}, "c": {}}}, {"b": -1.5}),
        ({"properties": {"a": {"type": ["string", "integer"], "enum": [1, 2]}, "b": {"enum": ["x", 1], "const": 1}},
          "required": ["a"]}, {"a": 2, "b": 1}),
        ({"properties": {"a": {"enum": ["x", "y"], "nullable": True}}}, {"a": "y"}),
        ({"properties": {}}, {}),
        ({"properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}, {"a": "<b>\n"}),
    ],
)  # fmt: skip
def test_arguments_of_all_kinds_in_every_dialect(dialect, schema, arguments):
    name = NAMES[dialect]
    grammar = Followed(calls_grammar(form_of(name, ""), {"f": schema}, must_call=True, strict=frozenset({"f"})))
    assert grammar.error is None
    family = next(one for one in FAMILIES.values() if one.format == name)
    text = family.write([("f", arguments)])
    if dialect == "python":
        given = ", ".join(f"{key}={PYTHON.get(str(value)) or json.dumps(value)}" for key, value in arguments.items())
        text = f"<function_calls>f({given})</function_calls>"
    assert grammar.takes(text), (text, grammar.taken(text))
    assert read(name, text, {"f": schema})[2] == [("f", arguments)]
    for at in range(3):
        drawn = grammar.drawn(random.Random(f"{dialect} {at}"))
        for _, found in read(name, drawn, {"f": schema})[2] if drawn else []:
            jsonschema.validate(found, {"type": "object", **schema})


PYTHON = {"None": "None", "True": "True"}


@pytest.mark.parametrize(
    ("name", "schema", "words"),
    [
        ("hermes", {"type": "array"}, '"type": "object"'),
        ("hermes", {"x-guidance": {"lenient": True}}, "x-guidance"),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern"),
        ("qwen3_coder", {"allOf": [{}]}, "allOf"),
        ("qwen3_coder", {"properties": {"a<b": {}}}, "a<b"),
        ("gemma4", {"properties": {"a": {"type": "string", "minLength": 3}}}, "minLength"),
        ("gemma4", {"properties": {"a": {"$ref": "#/$defs/x"}}}, "leads nowhere"),
        ("olmo3", {"properties": {"class": {}}}, "'class'"),
        ("gemma4", {"properties": {"a": {"anyOf": 5, "type": "array", "minItems": "x"}}}, "no valid JSON Schema"),
    ],
)
def test_what_a_strict_tool_cannot_be_held_to_is_refused_by_name(name, schema, words):
    with pytest.raises(GrammarError, match=r"tools\.0\.function\.parameters: ") as raised:
        calls_grammar(form_of(name, ""), {"f": schema}, must_call=True, strict=frozenset({"f"}))
    assert words in str(raised.value)


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "gemma4", "olmo3"])
def test_loose_tools_take_any_arguments(name):
    schema = {"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}
    grammar = Followed(calls_grammar(form_of(name, ""), {"f": schema}, must_call=True, is_loose=True))
    assert grammar.error is None
    text = grammar.drawn(random.Random(name))
    assert read(name, text, {"f": schema})[2][0][0] == "f"


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "gemma4", "olmo3"])
@pytest.mark.parametrize("schema", [{"type": ["object", "null"]}, "string"])
def test_loose_tools_may_have_any_schema(name, schema):
    grammar = calls_grammar(form_of(name, ""), {"f": schema}, must_call=True, is_loose=True)
    assert Followed(grammar).error is None


def doubled(union, depth=60):
    """Each part leads to the next in two ways: 2 ** depth ways in all."""
    parts = {str(at): {union: [{"$ref": f"#/$defs/{at + 1}"}] * 2} for at in range(depth)}
    return {"$defs": {**parts, str(depth): {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/0"}}}


def doubled_types(depth=60):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": ["object", "object"], "properties": {"a": schema}}
    return {"properties": {"a": schema}}


def all_for_each(count=2000):
    """Each property leads to all of a long list."""
    long = {"anyOf": [{"title": str(at)} for at in range(count)]}
    return {"$defs": {"long": long}, "properties": {f"p{at}": {"anyOf": [{"$ref": "#/$defs/long"}, {"title": str(at)}]}
            for at in range(count)}}  # fmt: skip


@pytest.mark.parametrize("dialect", NAMES)
@pytest.mark.parametrize("schema", [doubled("anyOf"), doubled("oneOf"), doubled_types()])
@pytest.mark.timeout(20)
def test_a_part_that_is_reached_in_many_ways_is_looked_at_few_times(dialect, schema):
    assert calls_grammar(form_of(NAMES[dialect], ""), {"f": schema}, must_call=True).num_looks < 10_000


def test_what_would_be_looked_at_too_often_is_refused():
    with pytest.raises(GrammarError, match="too often"):
        calls_grammar(form_of("qwen3_coder", ""), {"f": all_for_each()}, must_call=True)


def test_an_expression_ends_with_no_open_escape():
    with pytest.raises(GrammarError, match="f: ends with a backslash"):
        calls_grammar(None, {}, content=ContentRule("regex", "ab\\", "f"))
    assert Followed(calls_grammar(None, {}, content=ContentRule("regex", "ab\\\\", "f"))).takes("ab\\")


def test_any_character_may_be_in_a_choice():
    text = "".join(map(chr, range(1, 0x100))) + "\u2028\ufeff\U0010ffff"
    assert Followed(calls_grammar(None, {}, content=ContentRule("choice", [text], "f"))).takes(text)


def test_a_mark_that_ends_the_answer_is_left_to_the_end():
    marks = type(TOKENS)(TOKENS.ids, frozenset({TOKENS.ids["<|call|>"]}))
    grammar = calls_grammar(form_of("harmony", ""), {"f": STRICT}, marks, must_call=True)
    assert f"<[{TOKENS.ids['<|call|>']}]>" not in grammar.render("answer")


def test_a_model_whose_calls_are_not_known_cannot_be_made_to_call():
    with pytest.raises(GrammarError, match=r"tools: .*model\.tool_format"):
        calls_grammar(None, {"f": STRICT}, must_call=True)


def test_the_field_at_fault_is_known():
    tools = {"a": {"properties": {}}, "b": {"properties": {"x": {"not": {}}}}}
    grammar = calls_grammar(form_of("hermes", ""), tools, must_call=True)
    followed = Followed(grammar)
    assert "not" in followed.error
    assert grammar.field_of(followed.error) == "tools.1.function.parameters"
