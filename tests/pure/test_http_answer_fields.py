"""What answers show beside their text, and how much of a prompt is read: whole and streamed alike."""

import json

import pytest

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
COMPLETION = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "ignore_eos": True}
BOTH = [(COMPLETIONS, COMPLETION), (CHATS, {**CHAT, "temperature": 0})]


def events(response):
    assert response.status_code == 200, response.text
    return [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]


def text_of(choice):
    message = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or message.get("content") or ""


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_token_ids_are_those_of_prompt_and_answer_with_the_stop_id(make_world, path, body):
    world = make_world(script=[40, 41, 42, 43])
    body = {**body, "return_token_ids": True, "stop_token_ids": [43], "n": 2}
    whole = world.post(path, body).json()
    prompt_ids = whole["prompt_token_ids"] if path == CHATS else whole["choices"][1]["prompt_token_ids"]
    assert [choice["token_ids"] for choice in whole["choices"]] == [[40, 41, 42, 43]] * 2
    assert len(prompt_ids) == whole["usage"]["prompt_tokens"] and (path == CHATS or prompt_ids == [5, 6, 7])
    told, prompts = {0: [], 1: []}, []
    for event in events(world.post(path, {**body, "stream": True})):
        prompts += [event["prompt_token_ids"]] if "prompt_token_ids" in event else []
        for choice in event["choices"]:
            told[choice["index"]] += choice.get("token_ids", [])
            prompts += [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
    assert told == {0: [40, 41, 42, 43], 1: [40, 41, 42, 43]}
    assert prompts == [prompt_ids] * (1 if path == CHATS else 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BOTH)
def test_token_ids_end_with_the_one_that_completed_a_stop_string(make_world, path, body, stream):
    world = make_world(script=[70, 71, 72, 73])
    stop = world.text._decode([71, 72])[-1]
    response = world.post(path, {**body, "return_token_ids": True, "stop": stop, "stream": stream, "max_tokens": 4})
    parts = events(response) if stream else [response.json()]
    told = [token for part in parts for choice in part["choices"] for token in choice.get("token_ids", [])]
    assert told == [70, 71, 72][: len(told)] and stop in world.text._decode(told)


def test_nobody_is_told_ids_who_did_not_ask(world):
    for path, body in BOTH:
        assert "token_ids" not in world.post(path, body).text
        assert "token_ids" not in world.post(path, {**body, "stream": True}).text


def test_tokens_can_be_named_by_their_ids(world):
    named = {"return_tokens_as_token_ids": True}
    plain, other = (
        world.post(COMPLETIONS, {**COMPLETION, "logprobs": 2, **more}).json()["choices"][0] for more in ({}, named)
    )
    ids = world.expected_ids([5, 6, 7], 6)
    assert other["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert all(f"token_id:{token}" in top for token, top in zip(ids, other["logprobs"]["top_logprobs"], strict=True))
    assert (plain["text"], plain["logprobs"]["token_logprobs"]) == (other["text"], other["logprobs"]["token_logprobs"])
    (choice,) = world.post(CHATS, {**CHAT, "logprobs": True, "top_logprobs": 1, **named}).json()["choices"]
    entry = choice["logprobs"]["content"][0]
    assert entry["token"].startswith("token_id:") and entry["top_logprobs"][0]["token"].startswith("token_id:")


def test_prompt_logprobs_are_those_that_an_echo_shows(world):
    body = {**COMPLETION, "prompt": list(range(10, 30)), "logprobs": 3, "max_tokens": 2}
    echoed = world.post(COMPLETIONS, {**body, "echo": True, "prompt_logprobs": 1}).json()["choices"][0]
    shown = echoed["prompt_logprobs"]
    assert shown[0] is None and len(shown) == 20
    for token, entry, logprob, top in zip(
        range(11, 30), shown[1:], echoed["logprobs"]["token_logprobs"][1:], echoed["logprobs"]["top_logprobs"][1:],
        strict=False,
    ):  # fmt: skip
        assert entry[str(token)]["logprob"] == logprob and len(entry) <= 2
        assert {value["logprob"] for value in entry.values() if value["rank"] == 1} == {max(top.values())}
        assert entry[str(token)]["decoded_token"] == world.text.token_texts.of(token).text
    plain = world.post(COMPLETIONS, {**body, "echo": True}).json()["choices"][0]
    assert plain["logprobs"] == echoed["logprobs"] and "prompt_logprobs" not in plain


def test_prompt_logprobs_of_chats_stand_beside_the_choices(world, error_of):
    answer = world.post(CHATS, {**CHAT, "prompt_logprobs": 0, "n": 2}).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert all(len(entry) == 1 for entry in answer["prompt_logprobs"][1:])
    error = error_of(world.post(CHATS, {**CHAT, "prompt_logprobs": 1, "stream": True}), 400)
    assert error["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [27, 28, 29]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [10, 11, 12]),
        ({"truncate_prompt_tokens": 99}, list(range(10, 30))),
        ({"truncate_prompt_tokens": -1, "prompt": list(range(10, 200)), "max_tokens": 100}, list(range(172, 200))),
        ({"truncate_prompt_tokens": -1, "prompt": list(range(10, 200)), "max_tokens": None}, list(range(73, 200))),
    ],
)
def test_a_prompt_is_cut_as_asked(world, fields, kept):
    body = {**COMPLETION, "prompt": list(range(10, 30)), "return_token_ids": True, "echo": True, **fields}
    answer = world.post(COMPLETIONS, body).json()
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == kept and answer["usage"]["prompt_tokens"] == len(kept)
    assert choice["text"].startswith(world.text._decode(kept)[:-1])


def test_a_text_and_a_conversation_are_cut_too(world, error_of):
    words = "the quick brown fox jumps over the lazy dog " * 30
    answer = world.post(COMPLETIONS, {**COMPLETION, "prompt": words, "truncate_prompt_tokens": 5, "echo": True}).json()
    assert answer["choices"][0]["text"].startswith(world.text._decode(world.ids(words)[-5:]))
    chat = {**CHAT, "messages": [{"role": "user", "content": words}], "truncate_prompt_tokens": -1}
    usage = world.post(CHATS, chat).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (122, 6)
    assert error_of(world.post(CHATS, {**chat, "truncate_prompt_tokens": 0}), 400)["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BOTH)
def test_special_tokens_are_text_where_they_are_not_skipped(make_world, path, body, stream):
    world = make_world(script=[40, 2, 41, 0, 42, 2])
    for skips in (True, False):
        response = world.post(path, {**body, "skip_special_tokens": skips, "stream": stream})
        parts = events(response) if stream else [response.json()]
        text = "".join(text_of(choice) for part in parts for choice in part["choices"])
        assert text == world.text._decode([40, 2, 41, 0, 42, 2], skip_special_tokens=skips)
        assert ("<|end|>" in text) is not skips


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BOTH)
def test_what_ended_an_answer_is_shown_where_asked(make_world, path, body, stream):
    world = make_world(script=[40, 41, 42, 43, 44, 45])
    words = world.text._decode([40, 41, 42, 43, 44, 45])
    stop = words[3:5]
    for fields, expected in (
        ({"stop": stop}, words.partition(stop)[0]),
        ({"stop": stop, "include_stop_str_in_output": True}, words.partition(stop)[0] + stop),
        ({"stop_token_ids": [43]}, world.text._decode([40, 41, 42])),
        ({"stop_token_ids": [43], "include_stop_str_in_output": True}, world.text._decode([40, 41, 42, 43])),
    ):
        response = world.post(path, {**body, **fields, "stream": stream})
        parts = events(response) if stream else [response.json()]
        choices = [choice for part in parts for choice in part["choices"]]
        assert "".join(map(text_of, choices)) == expected
        assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_load_testers_get_the_usage_in_every_chunk(world, path, body):
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = events(world.post(path, {**body, "stream": True, "stream_options": options, "n": 2}))
    counts = [event["usage"]["completion_tokens"] for event in told]
    assert counts == sorted(counts) and counts[-1] == 12
    assert all(event["usage"]["prompt_tokens"] == told[0]["usage"]["prompt_tokens"] for event in told)
    assert told[-1]["choices"] == []
    without = events(world.post(path, {**body, "stream": True, "stream_options": {"continuous_usage_stats": True}}))
    assert all(event["choices"] and event["usage"] for event in without)


def test_a_requests_own_id_is_the_answers(world, error_of):
    assert world.post(COMPLETIONS, {**COMPLETION, "request_id": "job-7.1"}).json()["id"] == "cmpl-job-7.1"
    for name in ("", "x" * 129, "a\nb", "é"):
        assert error_of(world.post(CHATS, {**CHAT, "request_id": name}), 400)["param"] == "request_id"
