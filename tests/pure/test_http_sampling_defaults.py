"""What a checkpoint's generation_config.json sets is what requests get for the fields that they leave out."""

import json

import pytest

from actors.decisions.model.generation_config import eos_token_ids
from actors.words.messages import SamplingParams
from cluster.topology import Topology
from configs.files import parse_args
from deployments.api.sampling_defaults import FIELDS, SamplingDefaults
from deployments.gangs import check_model

COMPLETION = {"model": "tiny", "prompt": [5, 6, 7], "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
BOTH = pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
EVERY = {**QWEN, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.25}
OTHERS = {  # values of their own for all that EVERY sets
    "temperature": 1,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


@pytest.fixture
def read(tmp_path):
    """The defaults of a folder with this generation_config.json: keys, or the file's text."""

    def read(keys, wanted="auto"):
        text = keys if isinstance(keys, str) else json.dumps(keys)
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
        return SamplingDefaults.read(tmp_path, wanted)

    return read


def sampled(world):
    """How the sequence that was opened last is sampled, by field."""
    new = [new for step in world.executor.steps for new in step.opened][-1]
    return {name: getattr(new.sampling, name) for name in FIELDS}


@BOTH
def test_a_field_that_is_left_out_or_null_is_the_checkpoints(make_world, read, path, body):
    world = make_world(defaults=read(EVERY))
    expected = {name: EVERY[name] for name in FIELDS}
    for sent in ({}, dict.fromkeys(FIELDS)):
        assert world.post(path, {**body, "max_tokens": 2, **sent}).status_code == 200
        assert sampled(world) == expected


@BOTH
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_named_is_the_requests(make_world, read, path, body, name):
    world = make_world(defaults=read(EVERY))
    assert world.post(path, {**body, "max_tokens": 2, name: OTHERS[name]}).status_code == 200
    assert sampled(world) == {**{other: EVERY[other] for other in FIELDS}, name: OTHERS[name]}


@BOTH
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"logprobs": True, "n": 2}, {"min_tokens": 4, "stop": "e"}])
def test_answers_are_those_of_the_same_values_in_the_request(make_world, read, path, body, more):
    if path == "/v1/completions" and "logprobs" in more:
        more = {**more, "logprobs": 2}
    values = {name: EVERY[name] for name in FIELDS}
    asked = {**body, **more, "seed": 7, "max_tokens": 8}
    said = make_world().post(path, {**asked, **values}).json()
    left_out = make_world(defaults=read(EVERY)).post(path, asked).json()
    assert (left_out["choices"], left_out["usage"]) == (said["choices"], said["usage"])


def test_without_such_a_file_the_defaults_are_the_apis_own(make_world, tmp_path):
    world = make_world(defaults=SamplingDefaults.read(tmp_path))
    world.post("/v1/completions", COMPLETION)
    assert sampled(world) == {name: getattr(SamplingParams(), name) for name in FIELDS}


@pytest.mark.parametrize(
    ("keys", "temperature"),
    [
        ({"do_sample": False}, 0),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, 0),
        ({"do_sample": True}, 1),
        ({"temperature": 0.6}, 0.6),
        ({"do_sample": None, "temperature": None, "top_p": 0.9}, 1),
        ({"temperature": 0.0}, 0),
    ],
)
def test_do_sample_false_is_greedy_unless_a_request_names_a_temperature(make_world, read, keys, temperature):
    world = make_world(defaults=read(keys))
    world.post("/v1/completions", COMPLETION)
    assert sampled(world)["temperature"] == temperature
    world.post("/v1/completions", {**COMPLETION, "temperature": 0.9})
    assert sampled(world)["temperature"] == 0.9
    assert sampled(world)["top_p"] == keys.get("top_p", 1)


# --- max_new_tokens -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("sent", "generated"), [({}, 24), ({"max_tokens": None}, 24), ({"max_tokens": 40}, 40)])
def test_max_new_tokens_is_the_length_of_requests_that_name_none(make_world, read, path, body, sent, generated):
    world = make_world(defaults=read({"max_new_tokens": 24}))
    assert world.post(path, {**body, **sent}).json()["usage"]["completion_tokens"] == generated


@BOTH
def test_max_new_tokens_never_asks_for_more_than_the_context(make_world, read, path, body):
    world = make_world(defaults=read({"max_new_tokens": 4096}))
    assert world.post(path, body).json()["usage"]["total_tokens"] == world.service.limits.max_model_len


# --- files that are wrong, and leaving the file out -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"temperature": -1}, "temperature: must be greater than or equal to 0"),
        ({"temperature": "0.6"}, "temperature: must be a valid number"),
        ({"do_sample": False, "temperature": "0.6"}, "temperature: must be a valid number"),
        ({"top_p": 2}, "top_p: must be less than or equal to 1"),
        ({"top_k": 2.5}, "top_k: must be a valid integer"),
        ({"min_p": [0.1]}, "min_p: must be a valid number"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be greater than or equal to 0.01"),
        ({"presence_penalty": True}, "presence_penalty: must be a valid number"),
        ({"do_sample": "no"}, "do_sample: must be a valid boolean"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be greater than or equal to 1"),
        ('{"temperature": NaN}', "temperature: must be a finite number"),
    ],
)
def test_wrong_values_name_file_key_and_remedy(read, tmp_path, keys, words):
    with pytest.raises(ValueError) as raised:
        read(keys)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'generation_config.json'}: {words}")
    assert message.endswith("; correct it, or set model.generation_config: none to leave its defaults out")
    assert read(keys, "none") == SamplingDefaults()


def test_all_wrong_values_are_said_at_once(read):
    with pytest.raises(ValueError) as raised:
        read({"temperature": -1, "top_p": 2, "top_k": 20})
    assert [line.split(": ")[1] for line in str(raised.value).splitlines()] == ["temperature", "top_p"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"7", b'{"top_p": 0.9}}', b'{"top_p": "\xff"}', b"[" * 100_000],
    ids=lambda raw: str(raw[:9]),
)
def test_a_file_that_is_no_object_is_named(tmp_path, raw):
    (tmp_path / "generation_config.json").write_bytes(raw)
    for read in (SamplingDefaults.read, eos_token_ids):
        with pytest.raises(ValueError, match=r"generation_config\.json: is no JSON object .*; get it again") as raised:
            read(tmp_path)
        assert str(raised.value).startswith(str(tmp_path))


def test_a_start_is_refused_before_anything_is_reserved(read, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="top_p"):
        read({"top_p": 2})
    model = {"source": str(tmp_path)}
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p: .*model\.generation_config: none"):
        check_model(parse_args({"model": model}), Topology(1, 1))
    check_model(parse_args({"model": {**model, "generation_config": "none"}}), Topology(1, 1))


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"generation_config.json": {"eos_token_id": [1, 2]}, "config.json": {"eos_token_id": 3}}, {1, 2}),
        ({"generation_config.json": {"eos_token_id": None}, "config.json": {"eos_token_id": 3}}, {3}),
        ({"config.json": {"eos_token_id": 0, "text_config": {"eos_token_id": 4}}}, {0}),
        ({"config.json": {"text_config": {"eos_token_id": [4, 5]}}}, {4, 5}),
        ({"config.json": {"text_config": None}}, set()),
        ({}, set()),
    ],
)
def test_where_the_ids_that_end_an_answer_come_from(tmp_path, files, ids):
    for name, keys in files.items():
        (tmp_path / name).write_text(json.dumps(keys))
    assert eos_token_ids(tmp_path) == ids


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["</s>", [1, "2"], 1.0, True, {"id": 1}])
def test_ids_that_are_none_are_named(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id: must be a token id or a list of them"):
        eos_token_ids(tmp_path)


# --- what is in force is said -----------------------------------------------------------------------------------------


def test_the_models_card_says_what_is_in_force(make_world, read):
    own = make_world().get("/v1/models/tiny").json()["sampling_defaults"]
    assert own == {**OTHERS, "max_tokens": None}
    card = make_world(defaults=read({**QWEN, "max_new_tokens": 512})).get("/v1/models/tiny").json()
    qwen = {name: value for name, value in QWEN.items() if name in FIELDS}
    assert card["sampling_defaults"] == {**own, **qwen, "max_tokens": 512}


def test_the_log_says_what_is_in_force_and_what_is_not_applied(read):
    qwen = {**QWEN, "bos_token_id": 0, "eos_token_id": [1], "pad_token_id": 0, "transformers_version": "4.37.0"}
    assert str(read(qwen)) == "temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05"
    assert str(read({"do_sample": False, "_from_model_config": True})) == "temperature 0"
    assert str(read({"eos_token_id": 1, "use_cache": True})) == "none"
    told = str(read({"num_beams": 4, "max_new_tokens": 512, "forced_eos_token_id": 2, "suppress_tokens": None}))
    assert told == "max_tokens 512; not applied: num_beams, forced_eos_token_id"
    assert str(read(EVERY, "none")) == "none"
