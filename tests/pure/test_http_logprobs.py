"""Log-probabilities: the model's by hand, in both of OpenAI's formats, whole and streamed, cut with their text."""

import asyncio
import json
import random
from types import MappingProxyType

import openai
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from actors.words.messages import TokenLogprobs
from deployments.api import logprobs
from deployments.api.logprobs import chat_logprobs, completion_logprobs
from deployments.text.tokenizer import Text
from deployments.text.transcript import ScoredToken, Transcript
from tests.fakes.fake_executor import logprobs_of

COMPLETION = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "ignore_eos": True}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
SENTENCE = "the quick brown fox jumps over the lazy dog, one two three"
VOCAB_SIZE = 400


def ids_of(text, words):
    return asyncio.run(text.encode([words]))[0]


def told(prompt_ids, ids, num_top):
    """What FakeExecutor tells of `ids` after a prompt."""
    known = [*prompt_ids, *ids]
    return [logprobs_of(known[:at], known[at], num_top, VOCAB_SIZE) for at in range(len(prompt_ids), len(known))]


def completion_object(text, ids, logprobs, offset=0):
    """OpenAI's, for ids whose texts are whole characters; None in `logprobs` for the first of a prompt."""
    shown = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, of_token in zip(ids, logprobs, strict=True):
        word = text._decode([token])
        shown["tokens"].append(word)
        shown["text_offset"].append(offset)
        offset += len(word)
        shown["token_logprobs"].append(of_token and of_token.logprob)
        shown["top_logprobs"].append(of_token and by_name(text, of_token, token))
    return shown


def by_name(text, logprobs, token):
    """The likeliest tokens and the token itself; of those that look alike, the likeliest."""
    pairs = [*zip(logprobs.top_ids, logprobs.top_logprobs, strict=True), (token, logprobs.logprob)]
    return {name(one, text): logprob for one, logprob in reversed(pairs)}


def name(token, text):
    return text.token_texts.of(token).text


def events_of(response):
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.strip().split("\n\n")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_completion_logprobs_are_those_of_the_model(make_world, text, num_top):
    ids = ids_of(text, SENTENCE)[:6]
    world = make_world(script=ids)
    (choice,) = world.post(COMPLETIONS, {**COMPLETION, "logprobs": num_top}).json()["choices"]
    assert choice["logprobs"] == completion_object(text, ids, told([5, 6, 7], ids, num_top))
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert all(1 <= len(top) <= num_top + 1 for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_chat_logprobs_are_those_of_the_model(make_world, text, num_top):
    ids = ids_of(text, SENTENCE)[:6]
    world = make_world(script=ids)
    (choice,) = world.post(CHATS, {**CHAT, "logprobs": True, "top_logprobs": num_top}).json()["choices"]
    prompt_ids = ids_of(text, "<s><|user|>hi\n<|assistant|>")
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    for entry, token, expected in zip(content, ids, told(prompt_ids, ids, num_top), strict=True):
        word = text._decode([token])
        assert (entry["token"], entry["bytes"], entry["logprob"]) == (word, list(word.encode()), expected.logprob)
        assert [top["token"] for top in entry["top_logprobs"]] == [name(top_id, text) for top_id in expected.top_ids]
        assert [top["logprob"] for top in entry["top_logprobs"]] == expected.top_logprobs
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]


def test_nobody_who_did_not_ask_is_told(world):
    assert world.post(COMPLETIONS, COMPLETION).json()["choices"][0]["logprobs"] is None
    assert world.post(CHATS, {**CHAT, "logprobs": False}).json()["choices"][0]["logprobs"] is None
    world.post(COMPLETIONS, {**COMPLETION, "logprobs": None, "echo": True})
    opened = [new.sampling for step in world.executor.steps for new in step.opened]
    assert [(sampling.logprobs, sampling.prompt_logprobs) for sampling in opened] == [(None, None)] * 3


WORDS = ["the quick 🦊 brown 你好 fox", "🇨🇭👋🏽 héllo", SENTENCE, "one two three" * 3]


@pytest.mark.parametrize("stop", [None, "own", "k ", "好", "zzz"])
@pytest.mark.parametrize("words", WORDS)
def test_streams_tell_the_same_as_plain_answers(make_world, text, words, stop):
    script = ids_of(text, words)
    body = {**COMPLETION, "max_tokens": len(script), "logprobs": 2, "stop": stop, "echo": True, "n": 2}
    world = make_world(script=script)
    plain = world.post(COMPLETIONS, body).json()["choices"]
    for index in range(2):
        texts, lists = "", {key: [] for key in plain[index]["logprobs"]}
        for chunk in events_of(world.post(COMPLETIONS, {**body, "stream": True})):
            (choice,) = chunk["choices"]
            if choice["index"] == index and choice["logprobs"]:
                texts += choice["text"]
                for key, entries in choice["logprobs"].items():
                    lists[key] += entries
                assert choice["logprobs"]["text_offset"][0] <= len(texts)
        assert texts == plain[index]["text"]
        assert lists == plain[index]["logprobs"]
    chat = {**CHAT, "max_tokens": len(script), "logprobs": True, "top_logprobs": 2, "stop": stop}
    plain = world.post(CHATS, chat).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in events_of(world.post(CHATS, {**chat, "stream": True}))]
    content = [entry for choice in chunks if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert content == plain["logprobs"]["content"]
    assert (
        b"".join(bytes(entry["bytes"]) for entry in content)
        .decode("utf-8", "ignore")
        .startswith(plain["message"]["content"])
    )


def test_a_stop_string_cuts_the_logprobs_of_what_it_cuts(make_world, text):
    script = ids_of(text, SENTENCE)
    world = make_world(script=script)
    body = {**COMPLETION, "max_tokens": len(script), "logprobs": 0}
    whole = world.post(COMPLETIONS, body).json()["choices"][0]
    for first in range(len(SENTENCE) - 6):
        stop = SENTENCE[first : first + 6]
        cut = world.post(COMPLETIONS, {**body, "stop": stop}).json()["choices"][0]
        assert cut["text"] == SENTENCE[:first]
        shown = sum(offset < first for offset in whole["logprobs"]["text_offset"])
        assert cut["logprobs"] == {key: entries[:shown] for key, entries in whole["logprobs"].items()}
        assert "".join(cut["logprobs"]["tokens"]).startswith(cut["text"])


def test_the_stop_id_has_no_text_and_no_logprob(make_world, text):
    script = [*ids_of(text, "one two"), 2]
    world = make_world(script=script)
    body = {**COMPLETION, "max_tokens": 20, "logprobs": 0, "ignore_eos": False}
    answer = world.post(COMPLETIONS, body).json()
    assert "".join(answer["choices"][0]["logprobs"]["tokens"]) == answer["choices"][0]["text"] == "one two"
    assert answer["usage"]["completion_tokens"] == len(script)


def test_ignored_special_tokens_have_a_logprob_but_no_text(make_world, text):
    ids = ids_of(text, "one")
    world = make_world(script=[*ids, 2, *ids])
    body = {**COMPLETION, "max_tokens": 2 * len(ids) + 1, "logprobs": 0}
    (choice,) = world.post(COMPLETIONS, body).json()["choices"]
    assert choice["text"] == "oneone"
    assert "".join(choice["logprobs"]["tokens"]) == "one<|end|>one"
    assert choice["logprobs"]["text_offset"][len(ids) + 1] == 3


# --- echo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_ids", [True, False])
def test_echo_shows_the_prompt_first(make_world, text, as_ids):
    prompt_ids, script = ids_of(text, "over the lazy"), ids_of(text, " dog, one")
    world = make_world(script=script)
    body = {**COMPLETION, "prompt": prompt_ids if as_ids else "over the lazy", "echo": True, "max_tokens": len(script)}
    assert world.post(COMPLETIONS, body).json()["choices"][0]["text"] == "over the lazy dog, one"
    (choice,) = world.post(COMPLETIONS, {**body, "logprobs": 3}).json()["choices"]
    assert choice["text"] == "over the lazy dog, one"
    logprobs = [None, *told(prompt_ids[:1], prompt_ids[1:], 3), *told(prompt_ids, script, 3)]
    assert choice["logprobs"] == completion_object(text, prompt_ids + script, logprobs)
    assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("num_prompt", [1, 2, 100, 128])
def test_max_tokens_0_only_computes_the_prompt(world, text, num_prompt, is_stream):
    dice = random.Random(num_prompt)
    prompt_ids = [dice.randrange(3, VOCAB_SIZE) for _ in range(num_prompt)]
    body = {**COMPLETION, "prompt": prompt_ids, "max_tokens": 0, "echo": True, "logprobs": 1, "stream": is_stream}
    response = world.post(COMPLETIONS, body)
    if is_stream:
        *parts, end = events_of(response)
        assert end["choices"][0]["finish_reason"] == "length"
        logprobs = [entry for part in parts for entry in part["choices"][0]["logprobs"]["token_logprobs"]]
        shown = "".join(part["choices"][0]["text"] for part in parts)
    else:
        answer = response.json()
        assert answer["usage"] == {
            "prompt_tokens": num_prompt, "completion_tokens": 0, "total_tokens": num_prompt
        }  # fmt: skip
        logprobs, shown = answer["choices"][0]["logprobs"]["token_logprobs"], answer["choices"][0]["text"]
        assert answer["choices"][0]["finish_reason"] == "length"
    assert logprobs == [None, *(entry.logprob for entry in told(prompt_ids[:1], prompt_ids[1:], 1))]
    assert shown == text._decode(prompt_ids)
    world.wait_until_idle()


def test_a_prompt_that_was_cached_is_told_of_all_the_same(world):
    prompt_ids = list(range(10, 110))
    world.post(COMPLETIONS, {**COMPLETION, "prompt": prompt_ids})
    body = {**COMPLETION, "prompt": prompt_ids, "echo": True, "logprobs": 0, "max_tokens": 0}
    logprobs = world.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[1:] == [entry.logprob for entry in told(prompt_ids[:1], prompt_ids[1:], 0)]
    assert world.engine.stats.num_prompt_cached == 0


def test_a_stop_string_in_the_prompt_stops_nothing(make_world, text):
    world = make_world(script=ids_of(text, " brown fox"))
    body = {**COMPLETION, "prompt": "the quick", "stop": ["quick", "fox"], "echo": True, "max_tokens": 20}
    assert world.post(COMPLETIONS, body).json()["choices"][0]["text"] == "the quick brown "


# --- the text of one token ------------------------------------------------------------------------------------------


def spaced_tokenizer():
    """As Llama 2 has it: spaces are ▁, unknown characters are bytes, a space at the start is dropped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁the", "▁dog"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"), vocabulary


def test_tokens_keep_their_space_and_say_their_bytes():
    tokenizer, vocabulary = spaced_tokenizer()
    texts = Text(tokenizer).token_texts
    assert (texts.of(vocabulary["▁the"]).text, texts.of(vocabulary["▁the"]).raw) == (" the", [32, 116, 104, 101])
    assert texts.of(vocabulary["a"]).text == "a"
    assert (texts.of(vocabulary["<0xF0>"]).text, texts.of(vocabulary["<0xF0>"]).raw) == ("bytes:\\xf0", [0xF0])
    assert texts.of(vocabulary["</s>"]).text == "</s>"
    assert texts.of(10**6).text == ""


def test_a_tokenizer_without_a_decoder_has_texts_too():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    texts = Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).token_texts
    assert (texts.of(1).text, texts.of(1).raw) == (" b", [32, 98])


def test_an_answer_goes_on_from_its_prompt_with_a_space(make_world):
    tokenizer, vocabulary = spaced_tokenizer()
    text = Text(tokenizer)
    the, dog = vocabulary["▁the"], vocabulary["▁dog"]
    transcript = text.transcript([])
    transcript.follow([the])
    assert transcript.push([dog]) + transcript.push([the], "length") == " dog the"
    alone = text.transcript([])
    assert alone.push([dog]) + alone.push([the], "length") == "dog the"


def test_byte_level_tokens_say_their_bytes(text, tokenizer):
    words = "🦊 你好 ñandú the fox"
    ids = ids_of(text, words)
    texts = [text.token_texts.of(token) for token in ids]
    assert b"".join(bytes(token.raw) for token in texts) == words.encode()
    parts = [token.text for token in texts if token.text.startswith("bytes:")]
    assert parts[0].startswith("bytes:\\xf0")


def test_logprobs_are_finite_whatever_the_ranks_say(text):
    worst = TokenLogprobs(float("-inf"), [7, 8], [0.0, float("nan")])
    token = [ScoredToken(9, 0, worst)]
    assert completion_logprobs(token, text.token_texts).token_logprobs == [-9999.0]
    (entry,) = chat_logprobs(token, text.token_texts).content
    assert [entry.logprob, *(top.logprob for top in entry.top_logprobs)] == [-9999.0, 0.0, -9999.0]


# --- min_tokens and stop strings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100))
def test_stop_strings_count_from_min_tokens_on(seed):
    """Against searching the whole text for a stop string that ends late enough; every id is one character."""
    dice = random.Random(seed)
    words = "".join(dice.choices("ab", k=20))
    stops = ["".join(dice.choices("ab", k=dice.randint(1, 5))) for _ in range(dice.randint(1, 3))]
    min_tokens = dice.randint(0, 20)
    ends = [end for end in range(min_tokens + 1, 21) if any(words[:end].endswith(stop) for stop in stops)]

    class OneCharacter:
        special_texts = MappingProxyType({})

        def push(self, token):
            return words[token]

        def flush(self):
            return ""

    transcript = Transcript(OneCharacter(), stops, min_tokens)
    shown = ""
    for token in range(20):
        shown += transcript.push([token], "length" if token == 19 else None, [token])
        if transcript.finish_reason:
            break
    scored = [token.token_id for token in transcript.take_scored()]
    if ends:
        assert (transcript.finish_reason, transcript.num_tokens) == ("stop", ends[0])
        starts = [ends[0] - len(stop) for stop in stops if words[: ends[0]].endswith(stop)]
        assert shown == words[: min(starts)]
    else:
        assert (transcript.finish_reason, shown) == ("length", words)
    assert scored == list(range(len(shown)))


def test_log_probabilities_of_prompts_are_bounded(world, error_of, monkeypatch):
    monkeypatch.setattr(logprobs, "MAX_PROMPT_ENTRIES", 60)
    body = {"model": "tiny", "prompt": [5] * 10, "max_tokens": 1}
    assert world.post(COMPLETIONS, {**body, "prompt_logprobs": 2, "n": 2}).status_code == 200
    for more in ({"prompt_logprobs": 2, "n": 3}, {"prompt_logprobs": 6}, {"logprobs": 6, "echo": True}):
        error = error_of(world.post(COMPLETIONS, {**body, **more}), 400)
        assert error["param"] == "prompt_logprobs" and "at most 60 are shown" in error["message"]
    assert world.post(COMPLETIONS, {**body, "logprobs": 6}).status_code == 200


def test_the_clients_own_objects(make_world, text):
    world = make_world(script=[*ids_of(text, "one 🦊 two"), 2])
    with world.serve() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chat = {key: value for key, value in CHAT.items() if key not in ("ignore_eos", "max_tokens")}
        whole = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0]
        data = b"".join(bytes(entry.bytes) for entry in whole.logprobs.content)
        assert data.decode() == whole.message.content == "one 🦊 two"
        assert all(len(entry.top_logprobs) == 2 for entry in whole.logprobs.content)
        with client.chat.completions.stream(**chat, logprobs=True, top_logprobs=2) as stream:
            assert stream.get_final_completion().choices[0].logprobs.content == whole.logprobs.content
        answer = client.completions.create(model="tiny", prompt="one", logprobs=2, echo=True, max_tokens=0)
        assert answer.choices[0].text == "one"
        assert answer.choices[0].logprobs.token_logprobs[0] is None
        assert answer.choices[0].logprobs.text_offset[0] == 0
