"""Which response format a model has: its tokenizer's own, or what its chat template tells; and odd templates."""

import json

import pytest
from transformers.utils.chat_parsing import parse_response

from deployments.text.chat_template import ChatTemplate
from deployments.text.prompts import Conversation
from deployments.text.response_format import choose_format
from deployments.text.response_formats import FORMATS
from deployments.text.response_reader import ResponseReader
from deployments.text.tool_calls import CallIds, value_types, with_call_ids
from tests.formats.writers import TOOLS

OWN = {  # as a tokenizer_config.json may have it
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
ANSWERS = [
    "Hello.",
    "<think>\nhm\n</think>\n\nHello.",
    (
        "<think>hm</think>I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
]


def read(found, pieces, prompt):
    reader = ResponseReader(found, found.prefix(prompt), TOOLS, CallIds(None, "salt", 0))
    deltas = [*(reader.push([(piece, False)]) for piece in pieces), reader.end()]
    calls = [(call.name, json.loads(call.arguments)) for delta in deltas for call in delta.calls]
    return "".join(one.content for one in deltas), "".join(one.reasoning for one in deltas), calls


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_tokenizers_own_template_reads_as_transformers_reads_it(answer, prompt):
    if "<think>" in prompt:
        answer = answer.removeprefix("<think>") if answer.startswith("<think>") else f"hm</think>{answer}"
    found = choose_format("auto", OWN, "{{ tools }} <function=", [], "")
    assert found.is_foreign
    tools = [{"type": "function", "function": {"name": name, "parameters": given}} for name, given in TOOLS.items()]
    right = parse_response(answer, OWN, prefix=prompt, tools=tools)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in right.get("tool_calls", [])]
    for pieces in ([answer], answer):
        assert read(found, pieces, prompt) == (right.get("content", ""), right.get("thinking", ""), calls)


@pytest.mark.parametrize("own", [5, {}, {"start_anchor": "x", "fields": {"a": {"open_pattern": "("}}}])
def test_a_wrong_template_of_a_tokenizer_is_passed_over(own):
    assert choose_format("auto", own, "{{ tools }} <tool_call>", [], "").name == "hermes"


def test_a_pattern_that_explodes_ends_no_answer(monkeypatch):
    monkeypatch.setattr("deployments.text.response_reader._MATCH_S", 0.05)
    field = {"open_pattern": "<(a+)+>", "close": "x", "content": "json"}
    own = {"start_anchor": "A", "fields": {"tool_calls": field, "content": {"content": "text"}}}
    text = "<" + "a" * 60 + "! and on"
    assert read(choose_format("auto", own, "", [], ""), text, "A")[0] == text


def test_a_pattern_without_text_ends_no_answer():
    fields = {
        "thinking": {"open_pattern": "(?=b)", "close_pattern": "(?=c)|$", "content": "text"},
        "content": {"content": "text", "close_pattern": "$|(?=d)"},
    }
    found = choose_format("auto", {"start_anchor": "A", "fields": fields}, "", [], "")
    content, reasoning, _ = read(found, "abcd", "A")
    assert sorted(content + reasoning) == sorted("abcd")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_told_by_each_of_its_marks(name):
    assert [choose_format("auto", None, "{{ tools }} " + mark, [], "").name for mark in FORMATS[name]["marks"]] == [
        name for _ in FORMATS[name]["marks"]
    ]


def test_what_tells_no_format():
    assert choose_format("none", OWN, "{{ tools }} <tool_call>", [], "") is None
    assert choose_format("auto", None, "{{ tools }}", [], "") is None
    assert choose_format("auto", None, "{{ messages }}", [], "").name == "hermes"
    assert choose_format("mistral", OWN, "{{ tools }} <tool_call>", [], "").name == "mistral"
    assert not choose_format("auto", None, "{{ tools }} </think>", [], "").has_calls
    in_message = "Use tools. {% if 'tools' in message and message.tools %}<|tool|>{% endif %}"
    assert choose_format("auto", None, in_message, [], "").name == "hermes"
    with pytest.raises(ValueError, match=r"model.tool_format: .*'qwen'.* hermes"):
        choose_format("qwen", None, "", [], "")


def test_thinking_is_read_only_where_the_model_knows_its_marks():
    assert not choose_format("auto", None, "<tool_call>", ["<tool_call>"], "").has_thinking
    assert choose_format("auto", None, "<tool_call> </think>", [], "").has_thinking
    assert choose_format("auto", None, "<tool_call>", ["</think>"], "").has_thinking


def test_the_anchor_is_what_the_template_begins_an_answer_with():
    found = choose_format("auto", None, "{{ tools }} <tool_call> </think>", [], "<|im_start|>assistant\n<think>\n")
    spelled = "<|im_start|>assistant\n<think> says the user<|im_end|>\n"
    assert found.prefix(spelled + "<|im_start|>assistant\n<think>\n") == "<think>\n"
    assert found.prefix(spelled + "<|im_start|>assistant\n") == ""
    assert found.prefix("no anchor <think>") == ""
    gemma = choose_format("gemma4", None, "<channel|>", [], "<|turn>model\n")
    assert gemma.prefix("<|turn>model\n<|tool_call>call:f{}<tool_call|><|tool_response>x<tool_response|>") == ""
    assert choose_format("auto", None, "{{ tools }} <tool_call> </think>", [], "").prefix("[/INST]") == ""


def test_templates_that_want_null_and_arguments_as_text_get_them():
    """DeepSeek R1's asks whether the content is none, and adds arguments to a text."""
    template = ChatTemplate(
        "{% for m in messages %}{% if plus %}{{ m['content'] + plus }}{% elif m['content'] is none %}null{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
        "{{ tools }}",
        {},
    )
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {"x": "é"}}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert template.render(Conversation(messages)) == 'nullnow {"x": "é"}None'
    assert template.render(Conversation(messages, variables={"plus": "!"})) == '!now {"x": "é"}None'
    template.close()


def test_ids_of_other_servers_become_those_that_the_model_knows():
    def call(call_id, name):
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}}

    messages = [
        {"role": "assistant", "tool_calls": [call("call_1", "now"), call("toolu_2", "later")]},
        {"role": "tool", "content": "x", "tool_call_id": "toolu_2"},
        {"role": "tool", "content": "x", "tool_call_id": "call_1"},
        {"role": "assistant", "tool_calls": [call("call_1", "now")]},
    ]
    kimi = with_call_ids(Conversation(messages), "kimi").messages
    assert [one["id"] for one in kimi[0]["tool_calls"]] == ["functions.now:0", "functions.later:1"]
    assert [one.get("tool_call_id") for one in kimi[1:3]] == ["functions.later:1", "functions.now:0"]
    assert kimi[3]["tool_calls"][0]["id"] == "functions.now:2"
    nine = with_call_ids(Conversation(messages), "nine").messages
    ids = [one["id"] for one in nine[0]["tool_calls"]]
    assert all(len(one) == 9 and one.isalnum() for one in ids)
    assert [one.get("tool_call_id") for one in nine[1:3]] == ids[::-1]
    assert with_call_ids(Conversation(messages), None).messages == messages


def test_types_of_a_schema_with_circles_are_found_at_once():
    loop = {"anyOf": [{"$ref": "#/properties/a"}] * 100 + [{"type": ["integer", 5]}], "oneOf": 7, "type": {}}
    schema = {"properties": {"a": loop, "b": {"enum": [1, 2]}, "c": {"$ref": "#/x/y"}, "d": 5}}
    assert value_types(schema, "a") == {"integer"}
    assert value_types(schema, "b") == {"integer"}
    assert not any(value_types(schema, key) for key in "cde")
    assert not value_types({"properties": [1]}, "a")


def test_how_a_checkpoints_own_format_is_written_follows_its_marks_or_its_chat_template():
    calls = {"open": "<c>", "close": "</c>", "content": "json", "repeats": True}
    thinking = {"open": "<t>", "close": "</t>", "content": "text"}
    own = {"start_anchor": "A", "fields": {"tool_calls": calls, "thinking": thinking, "content": {"content": "text"}}}
    found = choose_format("auto", own, "{{ tools }}", [], "")
    assert (found.form.call[:6], found.form.call[-7:], found.thought) == ("<c>%LF", "%LF</c>", ("<t>", "</t>"))
    own["fields"]["tool_calls"] = OWN["fields"]["tool_calls"]
    assert choose_format("auto", own, "{{ tools }} <function=", [], "").form.dialect == "tags"
    assert choose_format("auto", own, "{{ tools }}", [], "").form is None
