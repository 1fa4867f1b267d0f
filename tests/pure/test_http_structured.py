"""Structured answers over HTTP: what each field makes of the grammar that ranks follow, and what is refused by name."""

import ast
import asyncio
import json
import re
from pathlib import Path

import openai
import pydantic
import pytest
from llguidance import LLMatcher, LLTokenizer

from deployments.api import grammar
from deployments.api.bodies import ChatBody, CompletionBody
from deployments.api.strict_body import check_body
from deployments.text.prompts import Conversation
from tests.pure.test_http_tools import CALL, CHAT, CHATS, NOW, THOUGHT, choice, events, ids_of, kimi, says, thinker

__all__ = ["kimi", "says", "thinker"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {key: value for key, value in CHAT.items() if key != "tools"}
INTEGER = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": INTEGER, "strict": True}}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "sky", "strict": True, "parameters": CITY}
STRICT = [{"type": "function", "function": WEATHER}, CHAT["tools"][1]]


class Asked:
    """The grammars that requests to one replica come with."""

    def __init__(self, world):
        self._world = world
        backend = world.text._tokenizer.backend_tokenizer
        self._tokenizer = LLTokenizer(backend.to_str(), n_vocab=400, eos_token=[1, 2])

    def grammar(self, kind=ChatBody, **body):
        sent = {**(PLAIN if kind is ChatBody else {"model": "tiny", "prompt": "x"}), **body}
        (request, *_) = asyncio.run(self._world.service.prepare(check_body(sent, kind), None)).requests
        return request.sampling.grammar

    def takes(self, words, **body):
        matcher = LLMatcher(self._tokenizer, self.grammar(**body), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = ids_of(self._world.text, words)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture
def asked(says, thinker):
    return Asked(says(thinker, "x"))


@pytest.fixture
def of_kimi(says, kimi):
    return Asked(says(kimi, "x"))


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        (FORMAT, ['{"x": 5}', '{"x":5}', '{\n  "x": 5\n}'], ['{"x": "5"}', "{}", "5", 'Sure: {"x": 5}']),
        ({"response_format": {"type": "json_object"}}, ['{"a": [1, {}]}', "{}"], ["[]", "5", "Sure."]),
        ({"structured_outputs": {"json": INTEGER}}, ['{"x": 5}'], ["{}"]),
        ({"structured_outputs": {"json": json.dumps(INTEGER)}}, ['{"x": 5}'], ["{}"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["[]"]),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, ["123"], ["12", "1234"]),
        ({"structured_outputs": {"choice": ["yes", "no"], "disable_fallback": False}}, ["yes", "no"], ["maybe", ""]),
        ({"structured_outputs": {"grammar": 'start: "a" "b"*'}}, ["a", "abb"], ["b"]),
        ({"guided_json": INTEGER}, ['{"x": 5}'], ["{}"]),
        ({"guided_regex": "[0-9]{3}", "guided_decoding_backend": "xgrammar"}, ["123"], ["12"]),
        ({"guided_choice": ["yes", "no"]}, ["yes"], ["maybe"]),
        ({"guided_grammar": 'root ::= "a" "b"*'}, ["abb"], ["b"]),
    ],
)
def test_what_a_field_makes_of_the_answer(asked, fields, right, wrong):
    for kind in (ChatBody, CompletionBody):
        for words in right:
            assert asked.takes(words, kind=kind, **fields), words
        for words in wrong:
            assert not asked.takes(words, kind=kind, **fields), words
    assert asked.takes(THOUGHT + right[0], **fields)  # a chat may think first
    assert not asked.takes(THOUGHT + wrong[0], **fields)


def test_nothing_is_asked_for_where_nothing_is_said(asked):
    for fields in (
        {}, {"response_format": {"type": "text"}}, {"tools": CHAT["tools"]}, {"tools": STRICT, "tool_choice": "none"},
        {"tools": CHAT["tools"], "parallel_tool_calls": False}, {"response_format": None, "guided_json": None},
    ):  # fmt: skip
        assert asked.grammar(**fields) is None


def test_whether_the_model_may_think_is_read_from_the_prompt(asked):
    off = {"chat_template_kwargs": {"enable_thinking": False}, **FORMAT}
    assert asked.takes('{"x": 5}', **off)
    assert not asked.takes(THOUGHT + '{"x": 5}', **off)


def named(name):
    return {"type": "function", "function": {"name": name}}


def allowed(mode, *names):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


OTHER = CALL.replace("{", '{"y": 1, ', 1)
BARE = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"tool_choice": "required"}, [CALL, NOW, f"{CALL}\n{NOW}", THOUGHT + NOW, BARE], ["Hm.", f"Hm. {NOW}", ""]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{NOW}"]),
        ({"tool_choice": named("now")}, [NOW, THOUGHT + NOW], [CALL, f"{NOW}\n{NOW}", "Hm."]),
        ({"tool_choice": allowed("required", "now")}, [NOW, f"{NOW}\n{NOW}"], [CALL, "Hm."]),
        ({"tool_choice": allowed("auto", "now")}, [NOW, "Hm.", f"I look. {NOW}\nDone."], [CALL, f"I look. {CALL}"]),
        ({"tools": STRICT}, ["Hm.", f"I look.\n{CALL}\n{NOW}", THOUGHT + CALL, "a <b> c"], [BARE, f"Hm. {BARE}"]),
        ({"tools": STRICT, "tool_choice": "required"}, [CALL, NOW], [BARE, OTHER]),
        ({"tools": STRICT, **FORMAT}, [CALL, '{"x": 5}', THOUGHT + '{"x": 5}', f"{CALL}\n{NOW}"], ["Hm.", BARE]),
        ({"tools": CHAT["tools"], **FORMAT}, [CALL, '{"x": 5}'], ["Hm.", "{}"]),
        ({"tool_choice": "required", **FORMAT}, [CALL], ['{"x": 5}']),
    ],
)  # fmt: skip
def test_what_a_choice_of_tools_makes_of_the_answer(asked, fields, right, wrong):
    for words in right:
        assert asked.takes(words, **{"tools": CHAT["tools"], **fields}), words
    for words in wrong:
        assert not asked.takes(words, **{"tools": CHAT["tools"], **fields}), words


def test_marks_that_are_control_tokens_are_asked_for_as_such(of_kimi):
    section = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
    now = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    other = now.replace("now:0", "get_weather:1")
    right = [section.format(now), section.format(now + other), section.format(now.replace(":0", ":12"))]
    for words in right:
        assert of_kimi.takes(words, tools=CHAT["tools"], tool_choice="required"), words
    assert not of_kimi.takes(section.format(""), tools=CHAT["tools"], tool_choice="required")
    assert of_kimi.takes(f"Ok. {section.format(now)}", tools=STRICT)
    assert not of_kimi.takes(section.format(other), tools=STRICT)  # without its city
    assert not of_kimi.takes('{"x": "<|tool_call_end|>"}', response_format={"type": "json_object"})


def test_a_tool_that_is_not_strict_fails_nobody(asked):
    parameters = {"type": "object", "properties": {"city": {"type": "string", "not": {"const": "Paris"}}}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    assert asked.takes(CALL, tools=tools, tool_choice="required")
    assert asked.takes(BARE.replace("{}", '{"a": 1}'), tools=tools, tool_choice="required")


NOT = {"type": "object", "properties": {"a": {"not": {}}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {"type": "regex"}}, "response_format.type", "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": NOT}}},
         "response_format.json_schema.schema", '["not"] (at properties.a.not)'),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "not a field"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "not empty"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "none of them empty"),
        ({"structured_outputs": {"choice": ["x"] * 5000}}, "structured_outputs.choice", "4096"),
        ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs.grammar", "unknown name"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "no JSON"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json", "must be a JSON Schema"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern",
         "not supported"),
        ({"structured_outputs": {"regex": "a"}, "guided_json": INTEGER}, "guided_json", "contradicts structured"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "leave it out"),
        ({"guided_choice": "yes"}, "guided_choice", "list of texts"),
        ({**FORMAT, "min_tokens": 3}, "min_tokens", "contradicts"),
        ({**FORMAT, "ignore_eos": True}, "ignore_eos", "contradicts"),
        ({**FORMAT, "allowed_token_ids": [5]}, "allowed_token_ids", "contradicts"),
        ({**FORMAT, "bad_words": ["x"]}, "bad_words", "contradicts"),
        ({**FORMAT, "messages": [*PLAIN["messages"], {"role": "assistant", "content": "{"}], "add_generation_prompt":
          False, "continue_final_message": True}, "continue_final_message", "cannot be begun"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": named("then"), "tools": CHAT["tools"]}, "tool_choice", "then is none of the tools"),
        ({"tool_choice": allowed("auto", "then"), "tools": CHAT["tools"]}, "tool_choice", "then is none"),
        ({"tool_choice": allowed("some", "now"), "tools": CHAT["tools"]}, "tool_choice", "allowed_tools"),
        ({"tool_choice": {"type": "function"}, "tools": CHAT["tools"]}, "tool_choice", "must name"),
        ({"tool_choice": "any", "tools": CHAT["tools"]}, "tool_choice", "required"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": NOT}}]},
         "tools.0.function.parameters", "at properties.a.not"),
        ({"functions": [{"name": "f"}]}, "functions", "send tools"),
        ({"function_call": {"name": "f"}}, "function_call", "send tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_sure_of_is_refused_by_name(says, thinker, error_of, fields, param, words):
    error = error_of(says(thinker, "x").post(CHATS, {**PLAIN, **fields}), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert error["message"].startswith(param)


def test_every_answer_to_a_request_has_the_grammar(says, thinker):
    world = says(thinker, '{"x": 5}')
    body = check_body({"model": "tiny", "prompt": ["a", "b"], "n": 2, "guided_json": INTEGER}, CompletionBody)
    requests = asyncio.run(world.service.prepare(body, None)).requests
    assert len({request.sampling.grammar for request in requests}) == 1
    assert len(requests) == 4


def test_grammars_of_all_answers_together_are_limited(says, thinker, error_of, monkeypatch):
    """Every answer brings its own to every rank."""
    monkeypatch.setattr(grammar, "MAX_CHARS_OF_ANSWERS", 4_000)
    body = {"model": "tiny", "prompt": ["a", "b"], "guided_choice": ["x" * 900]}
    world = says(thinker, "x" * 900)
    world.post("/v1/completions", body)
    for more, param in (({"n": 3}, "n"), ({"prompt": ["a"] * 5}, "prompt")):
        assert error_of(world.post("/v1/completions", {**body, **more}), 400)["param"] == param


def test_the_example_of_the_docs_is_answered_as_they_say(asked):
    (example,) = re.findall(
        r"```python\n(place = .*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL
    )
    schema, call = ast.parse(example).body
    names = {"place": ast.literal_eval(schema.value)}
    (given,) = [keyword.value for keyword in call.value.keywords if keyword.arg == "response_format"]
    response_format = eval(compile(ast.Expression(given), "docs", "eval"), {}, names)
    fields = {"response_format": response_format}
    assert asked.takes('{"city": "Paris", "country": "France"}', **fields)
    assert not asked.takes('{"city": "Paris"}', **fields)


def test_a_grammar_reaches_the_ranks_and_its_answer_the_client(says, thinker):
    world = says(thinker, THOUGHT + '{"x": 5}')
    answer = choice(world.post(CHATS, {**PLAIN, **FORMAT}))
    assert (answer["message"]["content"], answer["message"]["reasoning"]) == ('{"x": 5}', "The sky?")
    assert answer["finish_reason"] == "stop"
    (opened,) = [one for step in world.executor.steps for one in step.opened]
    assert '"x"' in opened.sampling.grammar
    chunks = events(world.post(CHATS, {**PLAIN, **FORMAT, "stream": True}))
    pieces = [text for chunk in chunks if (text := chunk["choices"][0]["delta"].get("content"))]
    assert "".join(pieces) == '{"x": 5}'


def test_json_is_shown_piece_by_piece(thinker):
    reader = thinker.reader(Conversation([]), [], 0)
    shown = [reader.push([(piece, False)]).content for piece in ('{"x', '": ', "5", "}")]
    assert shown == ['{"x', '":', " 5", "}"]  # blanks wait for what follows them


def test_a_call_that_must_be_is_one(says, thinker):
    world = says(thinker, THOUGHT + NOW)
    answer = choice(world.post(CHATS, {**CHAT, "tool_choice": named("now")}))
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["now"]
    assert answer["finish_reason"] == "tool_calls"


class Point(pydantic.BaseModel):
    x: int


def test_openais_client_parses_into_its_own_types(says, thinker):
    with says(thinker, THOUGHT + '{"x": 5}').serve() as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked = {"model": "tiny", "messages": PLAIN["messages"], "response_format": Point}
        parsed = client.chat.completions.parse(**asked)
        assert parsed.choices[0].message.parsed == Point(x=5)
        with client.chat.completions.stream(**asked) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.parsed == Point(x=5)


class GetWeather(pydantic.BaseModel):
    city: str


def test_openais_client_parses_the_arguments_of_strict_tools(says, thinker):
    with says(thinker, CALL.replace("get_weather", "GetWeather")).serve() as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        parsed = client.chat.completions.parse(
            model="tiny", messages=PLAIN["messages"], tools=[openai.pydantic_function_tool(GetWeather)]
        )
        assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="São 東京")
