"""Unknown fields: ignored and named in a header, or refused; what would change the answer is never ignored."""

import json

import pytest

from deployments.api import strict_body
from deployments.api.bodies import ChatBody, CompletionBody
from deployments.api.foreign_fields import OF_CHATS, OF_COMPLETIONS
from deployments.api.strict_body import MAX_IGNORED

COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0}
USER = {"role": "user", "content": "hi"}
CHAT = {"model": "tiny", "messages": [USER], "max_tokens": 4, "temperature": 0}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
def test_what_means_nothing_is_ignored_and_named_in_one_header(make_world, stream):
    world = make_world(max_model_len=512)
    plain = world.post(CHATS, {**CHAT, "stream": stream})
    assert "warning" not in plain.headers
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "x": 1}, "y": 2}
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [part], "type": "text", "id": 5, "opts": {"visible": False}},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon", "id": 6},
    ]
    answer = world.post(CHATS, {**CHAT, "messages": messages, "stream": stream, "keep_alive": 5, "é\r\nx": 1})
    assert answer.status_code == 200
    (header,) = answer.headers.get_list("warning")
    assert header == (
        '299 - "ignored unknown fields: keep_alive, (unprintable name), messages.type, messages.id, messages.opts, '
        'messages.content.cache_control, messages.tool_calls.y, messages.tool_calls.function.x"'
    )


def test_the_answer_is_the_same_and_null_needs_no_header(world):
    plain = world.post(CHATS, CHAT)
    answer = world.post(CHATS, {**CHAT, "messages": [{**USER, "type": "text"}], "no_such_field": None})
    assert answer.json()["choices"] == plain.json()["choices"]
    assert answer.headers["warning"] == '299 - "ignored unknown fields: messages.type"'
    answer = world.post("/tokenize", {"messages": [USER], "nothing": 1})
    assert (answer.status_code, answer.headers["warning"]) == (200, '299 - "ignored unknown fields: nothing"')


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, COMPLETION), (CHATS, CHAT)])
def test_errors_name_them_too(world, error_of, path, body):
    response = world.post(path, {**body, "whatever": 1, "max_tokens": 1000})
    assert error_of(response, 400)["code"] == "context_length_exceeded"
    assert response.headers["warning"] == '299 - "ignored unknown fields: whatever"'


def test_a_config_has_them_refused(make_world, error_of):
    world = make_world(unknown_fields="refuse")
    for fields, param in (
        ({"whatever": 1}, "whatever"),
        ({"messages": [{**USER, "id": 5}]}, "messages.0.id"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ):
        error = error_of(world.post(CHATS, {**CHAT, **fields}), 400)
        assert (error["param"], error["code"]) == (param, "unknown_parameter")
    assert error_of(world.post("/detokenize", {"tokens": [5], "x": 1}), 400)["param"] == "x"


@pytest.mark.parametrize(
    ("path", "name", "meant"),
    [
        (CHATS, "temprature", "temperature"),
        (CHATS, "response_fromat", "response_format"),
        (CHATS, "max_completion_token", "max_completion_tokens"),
        (CHATS, "maxTokens", "max_tokens"),
        (CHATS, "topP", "top_p"),
        (COMPLETIONS, "topK", "top_k"),
        (COMPLETIONS, "MAX_TOKENS", "max_tokens"),
        (COMPLETIONS, "logprob", "logprobs"),
        (COMPLETIONS, "repetition_penality", "repetition_penalty"),
    ],
)
def test_a_name_that_is_nearly_a_fields_is_no_unknown_one(world, error_of, path, name, meant):
    error = error_of(world.post(path, {**(CHAT if path == CHATS else COMPLETION), name: 1}), 400)
    assert (error["param"], error["code"]) == (name, "unknown_parameter")
    assert error["message"] == f"{name}: is not a field; send {meant}"


@pytest.mark.parametrize(
    ("path", "body", "foreign"), [(COMPLETIONS, COMPLETION, OF_COMPLETIONS), (CHATS, CHAT, OF_CHATS)]
)
def test_names_of_other_servers_are_refused_with_what_to_send(world, error_of, path, body, foreign):
    kind = CompletionBody if path == COMPLETIONS else ChatBody
    assert not set(foreign) & set(kind.model_fields)
    for name in ("max_new_tokens", "repeat_penalty", "enable_thinking", "lora_request"):
        error = error_of(world.post(path, {**body, name: 1}), 400)
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert foreign[name] in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [{**USER, "images": ["x"]}]}, "messages.0.images", "send text only"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {}}]}]},
            None,
            "send text",
        ),
        ({"messages": [USER, {"role": "assistant", "toolcalls": []}]}, "messages.1.toolcalls", "send tool_calls"),
        ({"tools": [{"function": {"name": "f", "paramaters": {}}}]}, "tools.0.function.paramaters", "send parameters"),
        ({"tools": [{"function": {"name": "f", "input_schema": {}}}]}, None, "send parameters"),
        ({"stream": True, "stream_options": {"include_usages": True}}, None, "send include_usage"),
        *(({name: 5}, name, "is ") for name in ("maxNewTokens", "stopSequences", "num_return_sequences", "suffix")),
    ],
)
def test_what_would_change_the_answer_is_refused_within_too(world, error_of, fields, param, words):
    error = error_of(world.post(CHATS, {**CHAT, **fields}), 400)
    assert words in error["message"] and error["param"] == (param or error["param"])


def test_completions_refuse_what_only_chats_have(world, error_of):
    for name in ("functions", "tool_choice", "documents", "chat_template", "continue_final_message"):
        assert "/v1/chat/completions" in error_of(world.post(COMPLETIONS, {**COMPLETION, name: 1}), 400)["message"]


def test_models_to_fall_back_on_are_ignored(world):
    assert world.post(CHATS, {**CHAT, "models": ["a"]}).headers["warning"] == '299 - "ignored unknown fields: models"'


def test_few_names_are_compared_however_many_are_unknown(make_world, monkeypatch):
    compared = []
    monkeypatch.setattr(strict_body, "get_close_matches", lambda *one: compared.append(one) or [])
    world = make_world(max_body_bytes=10**6)
    for start in ("\x01", "x" * 80, "x"):
        names = {f"{start}{number}": 1 for number in range(9000)}
        world.post(CHATS, {**CHAT, **names, "messages": [{**USER, **names}, USER]})
    assert 0 < len(compared) <= 3 * MAX_IGNORED


def test_the_header_is_bounded(world, error_of):
    names = {f"unknown_{number}_{'x' * 40}": 1 for number in range(32)}
    answer = world.post(COMPLETIONS, {**COMPLETION, **names})
    assert answer.status_code == 200 and len(answer.headers["warning"]) < 4096
    answer = world.post(COMPLETIONS, {**COMPLETION, **names, "another": 1})
    assert error_of(answer, 400)["param"] == "another"


def test_a_body_that_is_too_large_says_it_in_the_words_of_a_context_that_is_too_short(world, error_of):
    raw = json.dumps({**CHAT, "user": "x" * 70_000}).encode()
    error = error_of(world.post(CHATS, raw=raw), 413)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 128 tokens. However, the body is larger")


def test_the_size_of_a_body_follows_the_context(make_world):
    world = make_world(max_body_bytes=None, max_model_len=1000)
    assert world.service.limits.max_body_bytes == 2**20 + 16_000
