"""Response formats: what families write, whole and cut anywhere: the same answer, the right calls, no exception."""

import json
import random
import time

import pytest

from deployments.text import tool_calls
from deployments.text.response_format import choose_format
from deployments.text.response_formats import FORMATS
from deployments.text.response_reader import ResponseReader
from deployments.text.tool_calls import CallIds
from tests.formats.writers import FAMILIES, TOOLS, some_calls

MARKS = " ".join(str(field) for entry in FORMATS.values() for field in entry["fields"].values()) + "<think></think>"
NUM_TEXTS = 40  # of each family, in the soak
NUM_SAMPLED = 8
TOLD = ("city", "days", "Paris", "東京", "path", "two")


def make_reader(name, prefix="", tools=TOOLS, **options):
    """A reader whose prompt ends with `prefix`."""
    found = choose_format(name, None, MARKS, [], "<|turn|>")
    return ResponseReader(found, found.prefix("<|turn|>" + prefix), tools, CallIds(None, "salt", 0), **options)


def joined(deltas):
    calls = [(call.name, json.loads(call.arguments)) for delta in deltas for call in delta.calls]
    return "".join(one.content for one in deltas), "".join(one.reasoning for one in deltas), calls


def read(name, pieces, **options):
    """Content, reasoning and calls of an answer that comes in these pieces."""
    reader = make_reader(name, **options)
    return joined([*(reader.push([(piece, False)]) for piece in pieces), reader.end()])


def dice_of(family, kind):
    return random.Random(f"{family} {kind}")


def calls_for(family, dice, count):
    calls = some_calls(dice, count)
    while not FAMILIES[family].has_dashes and any("-" in name for name, _ in calls):
        calls = some_calls(dice, count)
    return calls


def answers(family, count):
    """(what the model writes, what is to be read of it) of one family; the first ones are the simplest."""
    one = FAMILIES[family]
    dice = dice_of(family, "answers")
    for at in range(count):
        calls = calls_for(family, dice, 1 + at % 3)
        thought = dice.choice(["", "Hm, 東京?\n\nLet me see: {x}"]) if at else ""
        before, after = (
            dice.choice(["", "I'll look. 👋", "Two\n\nlines"]) if one.has_text_around and at else "" for _ in "12"
        )
        opens, closes = one.thinking
        text = (opens + thought + closes if thought else "") + before + ("\n" if before else "") + one.write(calls)
        content = "\n".join(filter(None, [before, after]))
        yield text + ("\n" + after if after else ""), (content, thought, calls)


def halves(text):
    return [(text[:at], text[at:]) for at in range(len(text) + 1)]


def chunks(text, dice):
    while text:
        size = dice.choice([1, 2, 3, 7, 30])
        yield text[:size]
        text = text[size:]


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_every_family_are_read_however_they_are_cut(family):
    name, dice = FAMILIES[family].format, dice_of(family, "cuts")
    for at, (text, right) in enumerate(answers(family, NUM_SAMPLED)):
        for cut in ([text], text, chunks(text, dice), *(halves(text) if at == 0 else [])):
            assert read(name, cut) == right, text


def broken(family, count):
    """Answers with something taken out, put in, or cut off."""
    dice = dice_of(family, "broken")
    for text, _ in answers(family, count):
        at = dice.randrange(len(text))
        kind = dice.choice(["cut off", "taken out", "put in", "twice"])
        if kind == "cut off":
            yield text[:at]
        elif kind == "taken out":
            yield text[:at] + text[at + dice.randrange(1, 9) :]
        elif kind == "put in":
            yield text[:at] + dice.choice(['"', "}", "]", "<", "\\", "</tool_call>", "<tool_call>", "\n"]) + text[at:]
        else:
            yield text[:at] + text


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_answers_are_the_same_however_they_are_cut(family):
    name, dice = FAMILIES[family].format, dice_of(family, "cuts")
    for text in broken(family, NUM_SAMPLED):
        whole = read(name, [text])
        assert read(name, text) == whole == read(name, chunks(text, dice)), text
        if not whole[2]:  # then nothing that it said is lost
            shown = whole[0] + whole[1]
            assert [shown.count(word) for word in TOLD] == [text.count(word) for word in TOLD], text


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_answers_and_all_broken_ones_cut_at_every_character(family):
    name = FAMILIES[family].format
    for text, right in answers(family, NUM_TEXTS):
        for cut in (text, *halves(text)):
            assert read(name, cut) == right, cut
    for text in broken(family, NUM_TEXTS):
        whole = read(name, [text])
        for cut in (text, *halves(text)):
            assert read(name, cut) == whole, cut


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_is_cut_off_has_whole_calls_only(family):
    one = FAMILIES[family]
    calls = calls_for(family, dice_of(family, "cut off"), 3)
    text = one.write(calls)
    for end in range(len(text)):
        content, _, found = read(one.format, [text[:end]])
        assert found == calls[: len(found)]
        assert found or content.strip() == text[:end].strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_of_no_tool_is_text(family):
    text = FAMILIES[family].write([("get_weather", {"city": "Paris"})])
    content, reasoning, calls = read(FAMILIES[family].format, text, tools={"other": {}})
    assert (content, reasoning, calls) == (text.strip(), "", [])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_tools_calls_are_text(family):
    text = FAMILIES[family].write([("get_weather", {"city": "Paris"})])
    content, _, calls = read(FAMILIES[family].format, text, tools={})
    assert not calls
    assert "Paris" in content


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_answers_pass(family):
    opens, closes = FAMILIES[family].text
    for text in ("Paris.", "  leading and trailing \n", "a < b; {c} [d] </x> \\ `e`", "", "{", "[1, 2]", "東京 👋"):
        shown = read(FAMILIES[family].format, opens + text + closes)
        assert (shown[0] if not opens else shown[0].strip(), *shown[1:]) == (
            text if not opens else text.strip(),
            "",
            [],
        )


CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
TAGGED = "<tool_call>\n<function=now></function>\n</tool_call>"
NOW = [("now", {})]


@pytest.mark.parametrize(
    ("name", "prefix", "text", "right"),
    [
        # whether the model is thinking is told by the prompt
        ("hermes", "<think>\n", "so\n</think>\n\nyes", ("yes", "so", [])),
        ("hermes", "<think>\n", "so", ("", "so", [])),
        ("hermes", "<think>\n\n</think>\n\n", "<think>x", ("", "x", [])),
        ("hermes", "", "<think></think>yes", ("yes", "", [])),
        ("hermes", "", "a <think> is a mark", ("a <think> is a mark", "", [])),
        # calls within a thought count only where nothing else follows
        ("hermes", "<think>", f"I may {CALL} or not</think>yes", ("yes", f"I may {CALL} or not", [])),
        ("hermes", "<think>", f"I will {CALL}\n{CALL}\n", ("", "I will", NOW * 2)),
        ("hermes", "<think>", f"I may {CALL}</think>yes", ("yes", f"I may {CALL}", [])),
        ("qwen3_coder", "<think>", f"I may {TAGGED} or not</think>yes", ("yes", f"I may {TAGGED} or not", [])),
        ("qwen3_coder", "<think>", f"I will {TAGGED}\n", ("", "I will", NOW)),
        # a mark in an argument is text of it, and a string that does not end takes no other call along
        ("hermes", "", '<tool_call>{"name": "now", "arguments": {"x": "</tool_call>"}}</tool_call>',
         ("", "", [("now", {"x": "</tool_call>"})])),
        ("hermes", "", f'<tool_call>{{"name": "now", "arguments": {{"x": "}}}}</tool_call>\n{CALL}',
         ('<tool_call>{"name": "now", "arguments": {"x": "}}</tool_call>', "", NOW)),
        # keys as others have them; arguments as text; none; what is not JSON; what JSON cannot say
        ("hermes", "", '<tool_call>{"tool_name": "now", "parameters": {}}</tool_call>', ("", "", NOW)),
        ("hermes", "", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', ("", "", NOW)),
        ("hermes", "", '<tool_call>{"name": "now"}</tool_call>', ("", "", NOW)),
        ("hermes", "", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', None),
        ("hermes", "", '<tool_call>{"name": "now", "arguments": {"x": NaN}}</tool_call>', None),
        ("hermes", "", '<tool_call>{"name": "now", "arguments": {"x": 1e999}}</tool_call>', None),
        ("hermes", "", '<tool_call>{"name": ["now"], "arguments": {}}</tool_call>', None),
        ("hermes", "", "<tool_call>" + "[" * 100_000 + "</tool_call>", None),
        ("hermes", "", '<tool_call>{"name": "now", "arguments": {"x": "\\ud800"}}</tool_call>',
         ("", "", [("now", {"x": "\ud800"})])),
        # bare JSON is a call only if it has what calls have
        ("llama3_json", "", '{"name": "now"}', None),
        ("llama3_json", "", '{"name": "Ann", "parameters": {}}', None),
        ("llama3_json", "", 'It is {"name": "now", "parameters": {}}', None),
        ("pythonic", "", "[now(), 1]", None),
        ("pythonic", "", "[now(__import__('os'))]", None),
        ("pythonic", "", "[now(x=y)]", None),
        ("pythonic", "", "[now(x=true, y=(1, -2))]", ("", "", [("now", {"x": True, "y": [1, -2]})])),
        # bare text has the type that the schema gives it
        ("qwen3_coder", "", ("<function=get_weather><parameter=days>3.0</parameter><parameter=city>5</parameter>"
         "<parameter=note>null</parameter><parameter=is_metric>True</parameter></function>"),
         ("", "", [("get_weather", {"days": 3, "city": "5", "note": None, "is_metric": True})])),
        ("qwen3_coder", "", "<function=get_weather><parameter=days>three</parameter></function>",
         ("", "", [("get_weather", {"days": "three"})])),
        ("qwen3_coder", "", "<function=now>\nnonsense</function>", None),
        ("qwen3_coder", "", "Use </tool_call> here", None),
        # text between calls
        ("hermes", "", f"a\n{CALL}\nb", ("a\nb", "", NOW)),
        ("gemma4", "", '<|tool_call>call:now{a:None,b:[<|"|>None<|"|>,{c:{}}],<|"|>d e<|"|>:1}<tool_call|>',
         ("", "", [("now", {"a": None, "b": ["None", {"c": {}}], "d e": 1})])),
        # gpt-oss: several thoughts, and text before a call
        ("harmony", "", ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b"
         "<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
         "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"),
         ("I look.", "a\nb", NOW)),
        ("harmony", "<|channel|>analysis<|message|>", "a", ("", "a", [])),
    ],
)  # fmt: skip
def test_by_hand(name, prefix, text, right):
    right = (text, "", []) if right is None else right
    assert read(name, [text], prefix=prefix) == right
    assert read(name, text, prefix=prefix) == right


def test_only_the_first_call_where_one_is_allowed():
    reader = make_reader("hermes", is_single=True)
    first = reader.push([(f"x {CALL}{CALL}", False)])
    assert reader.is_done
    assert joined([first, reader.push([(CALL, False)]), reader.end()]) == ("x", "", NOW)


def test_calls_that_the_prompt_has_are_none_of_the_answer():
    reader = make_reader("hermes", prefix=CALL, is_single=True)
    assert not reader.is_done
    assert joined([reader.push([(f"yes {CALL}", False)]), reader.end()]) == ("yes", "", NOW)


def test_special_tokens_are_marks_that_nobody_sees():
    kimi = [("<|tool_calls_section_begin|>", True), ("<|tool_call_begin|>", True), ("functions.now:0", False)]
    kimi += [("<|tool_call_argument_begin|>", True), ("{}", False), ("<|tool_call_end|>", True)]
    kimi += [("<|tool_calls_section_end|>", True), ("<|im_end|>", True)]
    reader = make_reader("kimi_k2")
    assert joined([reader.push([("Hm", False), ("<|x|>", True), (".", False), *kimi]), reader.end()]) == (
        "Hm.",
        "",
        NOW,
    )
    reader = make_reader("kimi_k2", tools={"other": {}})
    assert joined([reader.push(kimi), reader.end()]) == ("functions.now:0{}", "", [])


def test_names_with_colons_can_be_called():
    call = "<|tool_call_begin|>functions.ns:tool:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert read("kimi_k2", call, tools={"ns:tool": {}}) == ("", "", [("ns:tool", {})])


@pytest.mark.parametrize(
    ("name", "body"),
    [("glm4", "<arg_key>a</arg_key><arg_value>" * 2000), ("qwen3_coder", "<parameter=a>" * 20_000)],
)
def test_tags_that_do_not_end_are_found_without_a_search(name, body):
    """A search that goes on from each of them would run into the time limit for one call."""
    field = choose_format(name, None, MARKS, [], "").template.fields["tool_calls"]
    with pytest.raises(ValueError, match="between the tags"):
        tool_calls._tags(field, body, {"name": "now"}, TOOLS)


def test_ids_of_calls_are_as_the_model_knows_them():
    assert CallIds("kimi", "salt", 2).next("now") == "functions.now:2"
    nine, other = CallIds("nine", "salt", 0), CallIds("nine", "pepper", 0)
    ids = [nine.next("now"), nine.next("now"), other.next("now")]
    assert len(set(ids)) == 3
    assert all(len(one) == 9 and one.isalnum() for one in ids)


def test_the_second_look_at_swallowed_calls_is_linear(monkeypatch):
    search, scanned = ResponseReader._search, []

    def counted(reader, *arguments):
        scanned.append(len(reader._text) - reader._pos)
        return search(reader, *arguments)

    monkeypatch.setattr(ResponseReader, "_search", counted)

    def work(count):
        scanned.clear()
        opening = '<tool_call>{"a": "'
        whole = read("hermes", [opening + CALL * count])
        assert whole == (opening + CALL, "", NOW * (count - 1))
        num_whole = sum(scanned)
        assert read("hermes", opening + CALL * count) == whole
        return num_whole

    assert work(400) < 5 * work(100)


HOSTILE = {
    "openings": "<tool_call>",
    "strings that do not end": '<tool_call>{"a": "</tool_call>',
    "white space": " \n",
    "a string": '<tool_call>{"a": "' + "x" * 20,
    "brackets": "[{",
    "calls": CALL,
    "thoughts": "<think></think>",
    "tags": "<function=now><parameter=a>x",
    "closed tags": "<function=now><parameter=a>x</parameter></function></tool_call>",
}


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "llama3_json"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_the_work_is_linear_whatever_is_written(name, kind):
    """Four times the text takes about four times as long; sixteen times would be quadratic."""

    def seconds(num_chars):
        text = (HOSTILE[kind] * num_chars)[:num_chars]
        pieces = [text[at : at + 8] for at in range(0, num_chars, 8)]
        times = []
        for _ in range(3):
            began = time.process_time()
            read(name, pieces)
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(40_000) < 9 * seconds(10_000) + 0.02
