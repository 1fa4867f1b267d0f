"""The tables of request fields: null passes, neutral values pass, all other values of a refused field do not."""

import json
import random

import pytest

from actors.words.messages import SamplingParams
from deployments.api.bodies import ChatBody, CompletionBody
from deployments.api.errors import ApiError
from deployments.api.sampling_fields import choice_seed
from deployments.api.strict_body import parse_body

REQUIRED = {
    CompletionBody: {"model": "m", "prompt": "p"},
    ChatBody: {"model": "m", "messages": [{"role": "user", "content": "c"}]},
}
OURS = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "ignore_eos",
    "stream", "stream_options", "n", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "min_tokens", "stop_token_ids", "logprobs", "top_logprobs", "timeout",
    "allowed_token_ids", "bad_words", "best_of", "priority", "cache_salt", "include_stop_str_in_output",
    "skip_special_tokens", "return_token_ids", "return_tokens_as_token_ids", "prompt_logprobs",
    "truncate_prompt_tokens", "truncation_side", "request_id",
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
}  # fmt: skip
OURS_OF_COMPLETIONS = OURS | {"echo", "add_special_tokens"}
OURS_OF_CHATS = OURS | {
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "include_reasoning",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "chat_template_kwargs",
}
INERT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "spaces_between_special_tokens", "stream_interval",
    "guided_decoding_backend",
}  # fmt: skip
INERT_IN_CHATS = INERT | {"prediction"}
FIELDS = [(kind, name) for kind in REQUIRED for name in kind.model_fields]


def parse(kind, **fields):
    return parse_body(json.dumps({**REQUIRED[kind], **fields}).encode(), kind)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_null_is_as_good_as_absent(kind, name):
    if name in REQUIRED[kind]:
        with pytest.raises(ApiError, match=f"{name}: is required"):
            parse(kind, **{name: None})
    else:
        assert parse(kind, **{name: None}) == parse(kind)


def is_refused(kind, name):
    if kind is CompletionBody:
        return name not in OURS_OF_COMPLETIONS | INERT
    return name not in OURS_OF_CHATS | INERT_IN_CHATS


@pytest.mark.parametrize(("kind", "name"), [field for field in FIELDS if is_refused(*field)])
def test_refused_fields_refuse_what_is_not_neutral_and_say_what_to_do(kind, name):
    with pytest.raises(ApiError) as raised:
        parse(kind, **{name: {"something": "meant"}})
    error = raised.value
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    assert "leave it out" in error.message
    _, send, neutral = error.message.partition("or send ")
    if send:
        assert parse(kind, **{name: json.loads(neutral)}) is not None


@pytest.mark.parametrize("kind", REQUIRED)
@pytest.mark.parametrize("name", sorted(INERT))
def test_fields_that_never_change_the_answer_pass(kind, name):
    assert parse(kind, **{name: {"any": ["thing"]}}) is not None


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionBody, {"detokenize": False}),
        (CompletionBody, {"truncate_prompt_tokens": 0}),
        (ChatBody, {"tool_choice": "required"}),
        (ChatBody, {"max_tokens": 3, "max_completion_tokens": 4}),
        (CompletionBody, {"max_completion_tokens": 4}),
        (CompletionBody, {"n": 0}),
        (CompletionBody, {"top_p": "1"}),
        (CompletionBody, {"best_of": 2}),
        (CompletionBody, {"top_logprobs": 1}),
        (CompletionBody, {"logprobs": True}),
        (ChatBody, {"logprobs": 3}),
        (ChatBody, {"continue_final_message": True, "add_generation_prompt": True}),
    ],
)
def test_values_near_the_neutral_ones_are_refused(kind, fields):
    with pytest.raises(ApiError) as raised:
        parse(kind, **fields)
    assert raised.value.param in fields


LOW_AND_HIGH = [
    ("top_p", 1e-9, 1, [0, -0.1, 1.01]),
    ("top_k", -1, 2**31 - 1, [-2, 1.5, "1", 2**31]),
    ("min_p", 0, 1, [-0.1, 1.1]),
    ("repetition_penalty", 0.01, 2, [0, -1, 2.1]),
    ("presence_penalty", -2, 2, [-2.1, 2.1]),
    ("frequency_penalty", -2, 2, [-2.1, 2.1]),
    ("min_tokens", 0, 10**9, [-1, 1.5, True]),
    ("n", 1, 128, [0, 129, 1.0, True]),
    ("priority", -(2**31), 2**31 - 1, [1.5, "1", True, 2**31]),
    ("allowed_token_ids", [], list(range(4096)), [list(range(4097)), [-1], [1.5], ["1"], [True], 5, [2**31]]),
    ("bad_words", [], ["x" * 256] * 128, [["x"] * 129, [""], ["x" * 257], [5], "x"]),
    ("prompt_logprobs", 0, 20, [-1, 21, True]),
    ("truncate_prompt_tokens", -1, 2**31 - 1, [-2, 0, 1.5, 2**31]),
    ("cache_salt", "", "x" * 256, [5, "x" * 257]),
    ("logit_bias", {"0": -100}, {"4294967295": 100}, [{"5": 101}, {"5": True}, {"5": None}, {"x": 1}, {"05": 1}]),
    ("logit_bias", {}, {str(token): 1 for token in range(1024)}, [{str(token): 1 for token in range(1025)}, [5], "5"]),
    ("logit_bias", {}, {"7": 0.5}, [{"-1": 1}, {" 5": 1}, {"5.0": 1}, {"": 1}, {"٥": 1}, {"9" * 5000: 1}]),
    ("stop_token_ids", [], list(range(128)), [list(range(129)), [-1], [1.5], ["1"], [True], 5, [2**31]]),
]


@pytest.mark.parametrize("kind", REQUIRED)
@pytest.mark.parametrize(("name", "low", "high", "wrong"), LOW_AND_HIGH)
def test_sampling_fields_have_bounds(kind, name, low, high, wrong):
    for value in (low, high):
        assert getattr(parse(kind, **{name: value}), name) is not None
    for value in wrong:
        with pytest.raises(ApiError) as raised:
            parse(kind, **{name: value})
        assert raised.value.param == name
        assert raised.value.message.startswith(name)


def test_logprobs_have_bounds():
    assert [parse(CompletionBody, logprobs=number).num_logprobs for number in (None, 0, 20)] == [None, 0, 20]
    assert parse(CompletionBody, logprobs=3).num_prompt_logprobs is None
    assert parse(CompletionBody, logprobs=3, echo=True).num_prompt_logprobs == 3
    assert parse(ChatBody, logprobs=True).num_logprobs == 0
    assert parse(ChatBody, logprobs=False).num_logprobs is None
    assert parse(ChatBody, logprobs=True, top_logprobs=20).num_logprobs == 20
    for kind, fields in (
        (CompletionBody, {"logprobs": 21}),
        (CompletionBody, {"logprobs": -1}),
        (ChatBody, {"logprobs": True, "top_logprobs": 21}),
        (ChatBody, {"top_logprobs": 1}),
        (ChatBody, {"logprobs": False, "top_logprobs": 1}),
    ):
        with pytest.raises(ApiError):
            parse(kind, **fields)


def test_nothing_may_be_generated_only_where_the_prompt_is_shown():
    assert parse(CompletionBody, max_tokens=0, echo=True).token_limit == ("max_tokens", 0)
    for kind, fields in ((CompletionBody, {}), (CompletionBody, {"echo": False}), (ChatBody, {})):
        with pytest.raises(ApiError, match="max_tokens"):
            parse(kind, max_tokens=0, **fields)


def test_seeds_of_choices_are_fixed_and_apart():
    assert [choice_seed(7, choice) for choice in range(3)] == [
        7,
        6314274172161667299,
        976897894264387852,
    ]  # as sha256sum says
    assert choice_seed(-1, 0) == 2**63 - 1
    seeds = {choice_seed(seed, choice) for seed in range(-50, 50) for choice in range(128)}
    assert len(seeds) == 12800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sampling_says_what_the_fields_say():
    plain = parse(ChatBody).sampling(0, 400)
    assert plain == SamplingParams()
    body = parse(ChatBody, temperature=1e-6, top_k=400, seed=3)
    assert body.sampling(0, 400) == SamplingParams(temperature=0.0, seed=3)
    assert body.sampling(0, 401).top_k == 400
    assert parse(ChatBody, top_k=-1).sampling(0, 400).top_k == 0
    assert parse(ChatBody, temperature=0.01).sampling(0, 400).temperature == 0.01


def test_one_stop_string_is_a_list_of_one():
    assert parse(ChatBody, stop="x").stop == ["x"]
    assert parse(ChatBody, stop=["x", "y"]).stop == ["x", "y"]
    assert parse(ChatBody, stop=[]).stop == []


def test_numbers_may_be_written_as_json_has_them():
    assert parse(ChatBody, temperature=0).temperature == 0.0
    assert parse(ChatBody, temperature=2, seed=2**63 - 1, max_tokens=1).seed == 2**63 - 1


@pytest.mark.parametrize("kind", REQUIRED)
def test_errors_stay_small_whatever_is_sent(kind):
    rubbish = [
        {"x" * 100_000: 1},
        {f"field{index}": 1 for index in range(20_000)},
        {"stop": ["\x00" * 100_000] * 9},
        {"messages": [7] * 100_000},
        {"messages": [{"role": "r" * 100_000, "content": "c"}]},
        {"prompt": [["x" * 100_000]]},
        {"model": ["x" * 100_000]},
        {"response_format": {"type": "json_schema", "json_schema": {"a": "b" * 100_000}}},
    ]
    for fields in rubbish:
        with pytest.raises(ApiError) as raised:
            parse(kind, **fields)
        assert len(raised.value.body()) < 4096


@pytest.mark.parametrize("message", ["\x00" * 10**6, "é👋" * 10**6, '"' * 10**6])
def test_error_bodies_are_bounded(message):
    assert len(ApiError(400, message, param="p" * 64, code="c" * 32).body()) <= 4096


def test_messages_become_what_templates_read():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None}
    body = parse(ChatBody, messages=[{"role": "user", "content": parts, "name": "n"}, answer])
    (conversation,) = body.prompts
    expected = [{"role": "user", "content": parts, "name": "n"}, {"role": "assistant", "content": "c"}]
    assert conversation.messages == expected


ODD = [None, True, 0, -1, 2**63, 1.5, 1e308, "", "x", "\x00", [], [[]], [0], ["x", 1], {}, {"a": {}}, {"type": "text"}]


@pytest.mark.parametrize("kind", REQUIRED)
def test_whatever_is_sent_is_a_body_or_a_400(kind):
    dice = random.Random(kind.__name__)
    names = [*kind.model_fields, "nonsense", ""]
    verdicts = {"taken": 0, "refused": 0}
    for _ in range(3000):
        fields = {dice.choice(names): dice.choice(ODD) for _ in range(dice.randint(0, 3))}
        raw = bytearray(json.dumps({**REQUIRED[kind], **fields}).encode())
        for _ in range(dice.choice([0, 0, 0, 1, 5])):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        try:
            body = parse_body(bytes(raw), kind)
            assert len(body.prompts) == body.num_prompts >= 1
            assert body.token_limit[1] is None or body.token_limit[1] >= (not body.echoes)
            assert body.sampling(0, 400).top_k < 400
            verdicts["taken"] += 1
        except ApiError as error:
            assert error.status == 400
            assert len(error.body()) <= 4096
            verdicts["refused"] += 1
    assert min(verdicts.values()) > 100
