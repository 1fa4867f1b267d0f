"""Plain requests against the app: what is answered, and what is refused with which words."""

import asyncio
import dataclasses
import json

import pytest

from actors.remote.meeting import RankInfo
from deployments.text.tokenizer import Text

COMPLETION = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
RANK = RankInfo(0, 0, 0, "node", 7, "cpu", (0, 2), 100, 0.5, {"idle": 1.5, "compute": 2.0})
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def test_models_are_listed_by_their_served_id(world, error_of):
    listed = world.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert world.get("/v1/models/tiny").json() == listed["data"][0]
    error = error_of(world.get("/v1/models/nope"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_completion_has_the_text_of_the_ids_that_the_model_says(world):
    response = world.post(COMPLETIONS, COMPLETION)
    assert response.status_code == 200
    body = response.json()
    ids = world.expected_ids([5, 6, 7], 4)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": world.text._decode(ids), "finish_reason": "length", "logprobs": None}
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert world.post(COMPLETIONS, COMPLETION).json()["choices"] == body["choices"]


def test_completions_generate_16_tokens_unless_told(world):
    body = world.post(COMPLETIONS, {"model": "tiny", "prompt": [3], "ignore_eos": True}).json()
    assert body["usage"]["completion_tokens"] == 16


def test_chat_generates_as_far_as_the_context_goes(world):
    body = world.post(CHATS, {**CHAT, "max_tokens": None, "ignore_eos": True}).json()
    assert body["usage"]["total_tokens"] == world.service.limits.max_model_len
    assert body["choices"][0]["finish_reason"] == "length"


def test_chat_answers_as_the_assistant(world):
    body = world.post(CHATS, CHAT).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    message = body["choices"][0]["message"]
    assert message["role"] == "assistant"
    prompt_ids = world.ids("<s><|user|>hello\n<|assistant|>")
    assert body["usage"]["prompt_tokens"] == len(prompt_ids)
    assert message["content"] == world.text._decode(world.expected_ids(prompt_ids, 4))


def test_content_parts_are_the_same_as_their_text(world):
    parts = {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    assert world.post(CHATS, parts).json()["choices"] == world.post(CHATS, CHAT).json()["choices"]


@pytest.mark.parametrize(
    ("prompt", "num_prompts"), [("abc", 1), (["abc", "de"], 2), ([5, 6], 1), ([[5, 6], [7], [5, 6]], 3)]
)
def test_every_prompt_has_its_own_answer(world, prompt, num_prompts):
    choices = world.post(COMPLETIONS, {**COMPLETION, "prompt": prompt}).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(num_prompts))
    if num_prompts == 3:
        assert choices[0]["text"] == choices[2]["text"] != choices[1]["text"]


def test_equal_seeds_give_equal_answers_and_negative_ones_are_taken(world):
    def answer(seed):
        return world.post(COMPLETIONS, {**COMPLETION, "temperature": 1, "seed": seed, "max_tokens": 12}).json()

    assert answer(7)["choices"] == answer(7)["choices"]
    assert answer(7)["choices"] != answer(8)["choices"]
    assert answer(-(2**63))["choices"][0]["finish_reason"] == "length"


def test_eos_ends_the_answer_and_has_no_text_but_counts(make_world):
    world = make_world(script=[40, 41, 2, 42, 43, 44])
    body = world.post(COMPLETIONS, {**COMPLETION, "max_tokens": 6}).json()
    assert body["choices"][0]["text"] == world.text._decode([40, 41])
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 3
    ignoring = world.post(COMPLETIONS, {**COMPLETION, "max_tokens": 6, "ignore_eos": True}).json()
    assert ignoring["choices"][0]["text"] == world.text._decode([40, 41, 42, 43, 44])
    assert ignoring["usage"]["completion_tokens"] == 6


def test_stop_string_is_cut_and_ends_the_request_in_the_engine(make_world):
    world = make_world()
    script = world.ids("the quick brown fox jumps over the lazy dog")
    world = make_world(script=script)
    body = world.post(COMPLETIONS, {**COMPLETION, "max_tokens": 100, "stop": ["nothing", "brown fox"]}).json()
    assert body["choices"][0]["text"] == "the quick "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < len(script)
    world.wait_until_idle()


NO_OBJECTS = [b"", b"null", b"42", b'"x"', b"[]", b"{", b'{"a":1,}', b"\xef\xbb\xbf{}", b"\xff\xfe", b"\x00"]
NO_JSON = [b'{"model":"\\ud800"}', b'{"temperature":NaN}', b'{"temperature":1e400}']
TOO_MUCH = [b"[" * 60_000, b'{"a":' * 10_000, b'{"max_tokens":' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("raw", [*NO_OBJECTS, *NO_JSON, *TOO_MUCH])
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_bodies_that_are_no_json_object_are_refused(world, error_of, path, raw):
    error_of(world.post(path, raw=raw), 400)


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_other_content_types_are_refused(world, error_of, content_type):
    error_of(world.post(COMPLETIONS, COMPLETION, headers={"content-type": content_type}), 415)


def test_content_type_may_have_parameters(world):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert world.post(COMPLETIONS, COMPLETION, headers=headers).status_code == 200


def test_large_bodies_are_refused_whether_announced_or_not(world, error_of):
    error_of(world.post(COMPLETIONS, {**COMPLETION, "user": "x" * 70_000}), 413)

    async def unannounced():
        async def chunks():
            for _ in range(100):
                yield b"x" * 1000

        async with world.http() as client:
            return await client.post(COMPLETIONS, content=chunks(), headers={"content-type": "application/json"})

    error_of(asyncio.run(unannounced()), 413)


BOTH = [
    ({"model": None}, "model"),
    ({"model": 7}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"n": True}, "n"),
    ({"n": 129}, "n"),
    ({"stop": [""]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": "x" * 10_000}, "stop"),
    ({"stop": [7]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": True}, "top_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"stop_token_ids": [400]}, "stop_token_ids"),
    ({"min_tokens": 5}, "min_tokens"),  # of 4
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"top_k": -2}, "top_k"),
    ({"response_format": {"type": "bogus"}}, "response_format.type"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"max_new_tokens": 4}, "max_new_tokens"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
]


@pytest.mark.parametrize(("changes", "param"), BOTH)
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, COMPLETION), (CHATS, CHAT)])
def test_wrong_fields_are_refused_by_name(world, error_of, path, body, changes, param):
    error = error_of(world.post(path, {**body, **changes}), 400)
    assert error["param"] == param
    assert error["message"].startswith(param)


@pytest.mark.parametrize(
    "prompt", [[], [[]], [-1], [400], [2**31], [2**63], [1.5], [True], ["a", 1], [[1], "a"], [[1], []], "", 7, {}, None]
)
def test_wrong_prompts_are_refused(world, error_of, prompt):
    assert error_of(world.post(COMPLETIONS, {**COMPLETION, "prompt": prompt}), 400)["param"] == "prompt"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 7}], "messages.0.content"),
        ([{"role": "function", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": "x"}, "x"], "messages.1"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
         "messages.0.content.0"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages.0.tool_calls.0.function"),
        ([{"role": "user", "content": "x", "reasoning": "y"}], "messages.0.reasoning"),
        ([{"role": "user", "content": "x", "tool_call_id": "y"}], "messages.0.tool_call_id"),
        ([{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}], "messages.0.content"),
        ([{"role": "user", "content": "fail"}], "messages"),
    ],
)  # fmt: skip
def test_wrong_messages_are_refused(world, error_of, messages, param):
    assert error_of(world.post(CHATS, {**CHAT, "messages": messages}), 400)["param"] == param


def test_refused_parts_and_fields_are_named(world, error_of):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}}]}]
    error = error_of(world.post(CHATS, {**CHAT, "messages": image}), 400)
    assert "image_url" in error["message"]
    assert "169.254" not in error["message"]
    error = error_of(world.post(CHATS, {**CHAT, "chat_template": "{% for i in range(9**9) %}{% endfor %}"}), 400)
    assert (error["param"], error["code"]) == ("chat_template", "unsupported_parameter")


@pytest.mark.parametrize(("path", "body"), [(CHATS, CHAT), ("/tokenize", {})])
def test_the_reason_of_a_chat_template_is_told(world, error_of, path, body):
    error = error_of(world.post(path, {**body, "messages": [{"role": "user", "content": "fail"}]}), 400)
    assert "roles must alternate" in error["message"]
    assert (error["param"], error["code"]) == ("messages", None)


@pytest.mark.parametrize(("path", "body"), [(CHATS, CHAT), ("/tokenize", {})])
def test_a_conversation_that_renders_too_long_is_refused(world, error_of, tokenizer_folder, monkeypatch, path, body):
    monkeypatch.setattr("deployments.text.chat_template.MAX_RENDERED_CHARS", 1000)
    world.service.text = Text.load(tokenizer_folder)
    try:
        error = error_of(world.post(path, {**body, "messages": [{"role": "user", "content": "x" * 1001}]}), 400)
    finally:
        world.service.text.close()
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "at most 1000" in error["message"]


def test_unknown_models_are_404(world, error_of):
    error = error_of(world.post(CHATS, {**CHAT, "model": "nope"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        (COMPLETIONS, {"max_tokens": 10**9}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 126}, "max_tokens"),
        (COMPLETIONS, {"prompt": [5] * 128}, "prompt"),
        (COMPLETIONS, {"prompt": "word " * 5000}, "prompt"),
        (CHATS, {"max_tokens": 128}, "max_tokens"),
        (CHATS, {"max_tokens": None, "max_completion_tokens": 10**9}, "max_completion_tokens"),
        (CHATS, {"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
    ],
)
def test_what_does_not_fit_the_context_is_refused_with_numbers(world, error_of, path, changes, param):
    body = COMPLETION if path == COMPLETIONS else CHAT
    error = error_of(world.post(path, {**body, **changes}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert error["message"].startswith("This model's maximum context length is 128 tokens. However, you requested ")
    ends = ("reduce the length of the prompt.", "the messages.", f" as {param}.")
    assert error["message"].endswith(tuple(f"{end} (context_length_exceeded)" for end in ends))


def test_the_longest_that_fits_is_served(world):
    body = world.post(COMPLETIONS, {**COMPLETION, "max_tokens": 125, "ignore_eos": True}).json()
    assert body["usage"]["total_tokens"] == 128
    body = world.post(COMPLETIONS, {**COMPLETION, "prompt": [5] * 127, "max_tokens": None}).json()
    assert body["usage"] == {"prompt_tokens": 127, "completion_tokens": 1, "total_tokens": 128}


def test_two_token_limits_must_agree(world, error_of):
    assert world.post(CHATS, {**CHAT, "max_completion_tokens": 4}).status_code == 200
    error_of(world.post(CHATS, {**CHAT, "max_completion_tokens": 5}), 400)


def test_a_full_server_refuses_before_it_tokenizes_and_recovers(make_world, error_of, monkeypatch):
    world = make_world(max_requests=2)
    with world.service.admission.reserve(1):
        assert world.post(COMPLETIONS, COMPLETION).status_code == 200
        monkeypatch.setattr(type(world.text), "encode", None)  # a refusal must not come this far
        response = world.post(COMPLETIONS, {**COMPLETION, "prompt": ["a", "b"]})
        assert error_of(response, 503)["code"] == "server_overloaded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        monkeypatch.undo()
    assert world.post(COMPLETIONS, {**COMPLETION, "prompt": ["a", "b"]}).status_code == 200
    assert error_of(world.post(COMPLETIONS, {**COMPLETION, "prompt": ["a"] * 3}), 400)["param"] == "prompt"
    assert world.service.admission.num_admitted == 0


def test_a_burst_admits_exactly_what_fits(make_world, error_of):
    world = make_world(max_requests=5)

    async def burst():
        async with world.http() as client:
            posts = [client.post(COMPLETIONS, json={**COMPLETION, "max_tokens": 40}) for _ in range(30)]
            return await asyncio.gather(*posts)

    responses = asyncio.run(burst())
    accepted = [response for response in responses if response.status_code == 200]
    assert len(accepted) == 5
    for response in responses:
        if response.status_code != 200:
            error_of(response, 503)
    world.wait_until_idle()


def test_errors_give_the_place_back(make_world, error_of):
    world = make_world(max_requests=1)
    for changes in ({"prompt": ""}, {"prompt": [999]}, {"model": "x"}, {"max_tokens": 500}, {"stop": [""]}):
        assert world.post(COMPLETIONS, {**COMPLETION, **changes}).status_code in (400, 404)
        assert world.service.admission.num_admitted == 0
    assert world.post(COMPLETIONS, COMPLETION).status_code == 200


def test_health_ready_version_and_cluster(make_world, error_of):
    world = make_world(ranks=lambda: [RANK])
    assert world.get("/health").status_code == 200
    assert world.get("/ready").status_code == 200
    assert world.get("/version").json() == {"version": "0.1.0"}
    assert world.get("/cluster").json() == {
        "model": "tiny",
        "replica": "replica-1",
        "state": "ready",
        "epoch": 0,
        "topology": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        "ranks": [{**dataclasses.asdict(RANK), "layers": [0, 2]}],
        "max_model_len": 128,
        "kv_blocks": {"total": 256, "used": 0, "cached": 0},
        "requests": {"running": 0, "waiting": 0},
        "graphs": {"shapes": 0, "captured": 0, "failed": []},
    }
    world.engine.close()
    assert world.get("/health").status_code == 200
    response = world.get("/ready")
    error_of(response, 503)
    assert 1 <= int(response.headers["retry-after"]) <= 60
    response = world.post(COMPLETIONS, COMPLETION)
    error_of(response, 503)
    assert "retry-after" in response.headers
    assert world.service.admission.num_admitted == 0


def test_unknown_paths_and_methods_are_openai_errors(world, error_of):
    error_of(world.get("/v1/nope"), 404)
    error_of(world.get("/v1/models/"), 404)
    error_of(world.get("/v1/completions/"), 404)
    response = world.get(COMPLETIONS)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(world.get("/health", method="DELETE"), 405)


def test_a_failing_engine_is_a_500_without_details(make_world, error_of):
    world = make_world()
    world.executor.fail(RuntimeError("boom at 0x7f3a in /usr/lib/python3/site-packages/x.py"))
    response = world.post(COMPLETIONS, COMPLETION)
    assert response.status_code in (500, 503)
    error_of(response, response.status_code)


def test_a_fault_of_ours_ends_one_request_and_says_nothing_of_the_prompt(world, error_of, monkeypatch, caplog):
    secret = "secret prompt"

    def broken(*_):
        raise KeyError(secret)

    with monkeypatch.context() as patch:
        patch.setattr("deployments.text.transcript.Transcript.push", broken)
        error = error_of(world.post(COMPLETIONS, COMPLETION), 500)
    assert error["code"] == "internal_error"
    assert "KeyError" in caplog.text
    assert secret not in caplog.text + json.dumps(error)
    assert world.post(COMPLETIONS, COMPLETION).status_code == 200
    world.wait_until_idle()
