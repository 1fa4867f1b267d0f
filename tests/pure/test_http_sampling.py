"""Sampling fields reach the ranks as they were meant; several answers to one prompt; where an answer may end."""

import asyncio

import openai
import pytest

from actors.words.messages import SamplingParams
from deployments.api.sampling_fields import choice_seed

COMPLETION = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "ignore_eos": True}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
FIELDS = {
    "temperature": 0.5,
    "seed": 11,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 1.5,
    "logit_bias": {"17": -100, "399": 2.5},
    "min_tokens": 3,
    "stop_token_ids": [399, 7],
    "allowed_token_ids": [17, 5, 17],
}


def opened(world):
    """What the ranks heard of each sequence, first to last."""
    return [new for step in world.executor.steps for new in step.opened]


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, COMPLETION), (CHATS, CHAT)])
def test_every_field_reaches_the_ranks(world, path, body):
    assert world.post(path, {**body, **FIELDS}).status_code == 200
    (new,) = opened(world)
    assert new.sampling == SamplingParams(
        temperature=0.5,
        seed=11,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=1.5,
        logit_bias={17: -100, 399: 2.5},
        min_tokens=3,
        stop_ids=[7, 399],
        allowed_ids=[5, 17],
    )


def test_neutral_values_reach_the_ranks_as_nothing(world):
    neutral = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "logit_bias": {}}
    world.post(COMPLETIONS, {**COMPLETION, **neutral, "min_tokens": 0, "stop_token_ids": []})
    assert opened(world)[0].sampling == SamplingParams(temperature=0.0)


def test_bad_words_reach_the_ranks_as_the_tokenizer_writes_them(world):
    world.post(COMPLETIONS, {**COMPLETION, "bad_words": ["fox", " lazy dog", "fox"]})
    expected = [world.ids(words) for words in ("fox", " fox", "lazy dog", " lazy dog")]
    assert opened(world)[0].sampling.bad_words == expected


def test_allowed_ids_must_exist_and_leave_something_before_min_tokens(world, error_of):
    for fields, param in (
        ({"allowed_token_ids": [400]}, "allowed_token_ids"),
        ({"allowed_token_ids": [7], "stop_token_ids": [7, 8], "min_tokens": 1}, "min_tokens"),
    ):
        assert error_of(world.post(COMPLETIONS, {**COMPLETION, **fields}), 400)["param"] == param


def test_best_of_is_n_or_refused(world, error_of):
    assert len(world.post(COMPLETIONS, {**COMPLETION, "n": 2, "best_of": 2}).json()["choices"]) == 2
    for fields in ({"best_of": 2}, {"n": 2, "best_of": 1}):
        assert error_of(world.post(COMPLETIONS, {**COMPLETION, **fields}), 400)["param"] == "best_of"


def test_priority_and_salt_reach_the_queue_and_the_cache(world, monkeypatch):
    requests = []
    add = world.engine.add
    monkeypatch.setattr(world.engine, "add", lambda request: (requests.append(request), add(request)))
    prompt = list(range(10, 74))
    for salt in ("", "a", "a"):
        world.post(COMPLETIONS, {**COMPLETION, "prompt": prompt, "priority": -3, "cache_salt": salt})
    assert [(request.priority, request.cache_salt) for request in requests] == [(-3, ""), (-3, "a"), (-3, "a")]
    assert world.engine.stats.num_prompt_cached == 48  # the third has the second's blocks


def test_as_many_answers_as_openai_documents(make_world):
    world = make_world(max_requests=128)
    answer = world.post(COMPLETIONS, {**COMPLETION, "n": 128, "temperature": 1, "max_tokens": 1}).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))
    world.wait_until_idle()


# --- where it ends --------------------------------------------------------------------------------------------------


def test_stop_token_ids_end_an_answer_and_have_no_text(make_world):
    world = make_world(script=[40, 41, 42, 43, 44, 45])
    answer = world.post(COMPLETIONS, {**COMPLETION, "stop_token_ids": [43]}).json()
    assert answer["choices"][0]["text"] == world.text._decode([40, 41, 42])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("min_tokens", range(7))
def test_min_tokens_forbid_the_ends_before(world, min_tokens):
    ids = world.expected_ids([5, 6, 7], 6)
    body = {**COMPLETION, "stop_token_ids": ids[1:], "min_tokens": min_tokens}
    answer = world.post(COMPLETIONS, body).json()
    if min_tokens <= 1:
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 2
    else:
        assert answer["usage"]["completion_tokens"] >= min_tokens


def test_min_tokens_forbid_end_of_sequence_too(make_world):
    world = make_world(script=[40, 41, 2])
    world.post(COMPLETIONS, {**COMPLETION, "ignore_eos": False, "min_tokens": 2, "stop_token_ids": [50]})
    world.post(COMPLETIONS, {**COMPLETION, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [50]})
    assert [new.sampling.stop_ids for new in opened(world)] == [[1, 2, 50], [50]]


def test_min_tokens_must_fit(world, error_of):
    for path, body, changes, words in (
        (COMPLETIONS, COMPLETION, {"min_tokens": 7}, "max_tokens"),
        (COMPLETIONS, COMPLETION, {"min_tokens": 17, "max_tokens": None}, "16"),
        (CHATS, CHAT, {"min_tokens": 7, "max_completion_tokens": 6}, "max_completion_tokens"),
        (CHATS, CHAT, {"min_tokens": 128, "max_tokens": None}, "max_tokens"),
    ):
        error = error_of(world.post(path, {**body, **changes}), 400)
        assert error["param"] == "min_tokens"
        assert words in error["message"]
    assert world.post(COMPLETIONS, {**COMPLETION, "min_tokens": 6}).status_code == 200


# --- several answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, COMPLETION), (CHATS, CHAT)])
def test_n_answers_with_seeds_of_their_own(make_world, path, body):
    world = make_world()
    fields = {**body, "temperature": 1, "seed": 7, "max_tokens": 5}
    answer = world.post(path, {**fields, "n": 4}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {new.sampling.seed for new in opened(world)} == {choice_seed(7, choice) for choice in range(4)}
    alone = world.post(path, fields).json()
    assert alone["choices"][0] == answer["choices"][0]
    texts = [choice.get("text") or choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 4
    assert world.post(path, {**fields, "n": 4}).json()["choices"] == answer["choices"]
    assert answer["usage"]["completion_tokens"] == 4 * alone["usage"]["completion_tokens"]
    assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]


def test_without_a_seed_each_answer_has_another(world):
    world.post(COMPLETIONS, {**COMPLETION, "temperature": 1, "n": 8})
    assert len({new.sampling.seed for new in opened(world)}) == 8


def test_n_of_several_prompts_in_openais_order(world):
    body = {**COMPLETION, "prompt": [[5, 6, 7], [9, 9]], "n": 3}
    answer = world.post(COMPLETIONS, body).json()
    first, second = (world.text._decode(world.expected_ids(prompt, 6)) for prompt in body["prompt"])
    assert [choice["text"] for choice in answer["choices"]] == [first] * 3 + [second] * 3
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 36, "total_tokens": 41}


def test_answers_share_the_blocks_of_their_prompt(world):
    prompt = list(range(10, 74))  # four blocks, of which the last id is always computed
    world.post(COMPLETIONS, {**COMPLETION, "prompt": prompt, "n": 5, "temperature": 1})
    assert world.engine.stats.num_prompt == 5 * 64
    assert world.engine.stats.num_prompt_cached == 4 * 48


def test_admission_counts_every_answer(make_world, error_of):
    world = make_world(max_requests=8)
    assert world.post(COMPLETIONS, {**COMPLETION, "n": 8}).status_code == 200
    with world.service.admission.reserve(1):
        response = world.post(COMPLETIONS, {**COMPLETION, "n": 8})
        assert error_of(response, 503)["code"] == "server_overloaded"
    for body in ({"n": 9}, {"prompt": [[5]] * 3, "n": 3}):
        assert "n" in error_of(world.post(COMPLETIONS, {**COMPLETION, **body}), 400)["message"]
    world.wait_until_idle()


def test_a_stop_string_ends_one_of_several(make_world):
    world = make_world()
    fields = {**COMPLETION, "temperature": 1, "seed": 7, "n": 4, "max_tokens": 12}
    whole = world.post(COMPLETIONS, fields).json()["choices"]
    stop = whole[2]["text"][4:7]
    cut = world.post(COMPLETIONS, {**fields, "stop": stop}).json()["choices"]
    assert cut[2]["text"] == whole[2]["text"].partition(stop)[0]
    for with_stop, without in zip(cut, whole, strict=True):
        assert with_stop["text"] == without["text"].partition(stop)[0]
        assert with_stop["finish_reason"] == ("stop" if stop in without["text"] else "length")
    world.wait_until_idle()


def test_the_client_reads_n_streams_at_once(make_world):
    world = make_world()
    with world.serve() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chat = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 9, "n": 3, "seed": 5}
        extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [5]}
        openai_fields = {"top_p": 0.5, "presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"5": -100}}
        whole = client.chat.completions.create(**chat, **openai_fields, extra_body=extra)
        texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
        for chunk in client.chat.completions.create(**chat, **openai_fields, extra_body=extra, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles[choice.index] += choice.delta.role is not None
                ends[choice.index] += choice.finish_reason is not None
        assert texts == [choice.message.content for choice in whole.choices]
        assert roles == ends == [1, 1, 1]


def test_biased_requests_leave_nothing_behind(world):
    async def go():
        async with world.http() as client:
            posts = [client.post(COMPLETIONS, json={**COMPLETION, **FIELDS, "n": 2, "seed": seed}) for seed in range(8)]
            return await asyncio.gather(*posts)

    assert {response.status_code for response in asyncio.run(go())} == {200}
    world.wait_until_idle()
    assert world.outbox._mailboxes == {}
