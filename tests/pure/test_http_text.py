"""Text: the same ids as the tokenizer's own, the same text as decoding at once, stop strings cut where they begin."""

import asyncio
import random
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.text.chat_template import ChatTemplate
from deployments.text.prompts import Conversation, ConversationError
from deployments.text.tokenizer import INLINE_CHARS, Text
from deployments.text.transcript import Decoder, StopStrings, Transcript
from tests.serving import is_alive, until

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "héllo 你好 👋 </s> <s>"},
    {"role": "assistant", "content": "one two\n"},
    {"role": "user", "content": "the lazy dog", "name": "fox"},
]


def encode(text, prompt):
    return asyncio.run(text.encode([prompt]))[0]


@pytest.mark.parametrize("num_turns", [1, 2, 4])
def test_chat_ids_are_those_of_the_tokenizers_own_template(text, tokenizer, num_turns):
    expected = tokenizer.apply_chat_template(
        TURNS[:num_turns], tokenize=True, add_generation_prompt=True, sanitize_control_tokens=True
    )
    expected = expected["input_ids"] if not isinstance(expected, list) else expected
    ids = encode(text, Conversation(TURNS[:num_turns]))
    assert ids == expected
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 0)  # what users spell is text


@pytest.mark.parametrize("prompt", ["", "hello", "héllo 你好 👋", "x y " * INLINE_CHARS])
def test_prompt_ids_are_the_tokenizers_own_and_never_cut(text, tokenizer, prompt):
    tokenizer.backend_tokenizer.no_truncation()
    assert encode(text, prompt) == tokenizer(prompt).input_ids


def test_token_ids_pass_as_they_are(text):
    assert encode(text, [5, 6, 7]) == [5, 6, 7]


def test_long_prompts_leave_the_event_loop_alone(text, monkeypatch):
    threads = []
    tokenize = text._tokenize

    def watched(*args, **options):
        threads.append(threading.current_thread())
        return tokenize(*args, **options)

    monkeypatch.setattr(text, "_tokenize", watched)
    encode(text, "x" * INLINE_CHARS)
    encode(text, "x" * (INLINE_CHARS + 1))
    encode(text, Conversation([{"role": "user", "content": "x" * (INLINE_CHARS + 1)}]))
    asyncio.run(text.encode(["x" * (INLINE_CHARS // 2)] * 3))
    assert [thread is threading.main_thread() for thread in threads] == [True, False, False, False, False, False]


def test_several_prompts_keep_their_order(text):
    prompts = ["one", [7, 8], "two" * INLINE_CHARS, "three"]
    assert asyncio.run(text.encode(prompts)) == [encode(text, prompt) for prompt in prompts]


@pytest.fixture
def with_template(tokenizer_folder):
    """Makes a Text with another chat template; its process is ended afterwards."""
    made = []

    def make(template):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))
        tokenizer.chat_template = template
        made.append(Text(tokenizer))
        return made[-1]

    yield make
    for text in made:
        text.close()


def test_what_a_template_writes_is_bounded(with_template, monkeypatch):
    monkeypatch.setattr("deployments.text.chat_template.MAX_RENDERED_CHARS", 1000)
    with pytest.raises(ConversationError, match="at most 1000") as raised:
        encode(with_template("{% for i in range(1001) %}x{% endfor %}"), Conversation(TURNS))
    assert raised.value.is_too_long


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 10**9 }}"


@pytest.mark.parametrize(("greed", "words"), [(ENDLESS, "too long"), (HUGE, "failed")])
def test_a_conversation_that_takes_too_much_is_refused_and_the_next_one_served(
    with_template, monkeypatch, greed, words
):
    """The same template serves others: what it takes depends on the messages."""
    monkeypatch.setattr("deployments.text.chat_template.CPU_S", 0.2)
    text = with_template("{% if messages[0].content == 'greed' %}" + greed + "{% endif %}{{ messages[0].content }}")
    assert encode(text, Conversation([{"role": "user", "content": "fox"}])) == encode(text, "fox")
    with pytest.raises(ConversationError, match=f"^messages: .*{words}"):
        encode(text, Conversation([{"role": "user", "content": "greed"}]))
    assert encode(text, Conversation([{"role": "user", "content": "fox"}])) == encode(text, "fox")


def test_the_event_loop_goes_on_while_a_template_runs(with_template, monkeypatch):
    monkeypatch.setattr("deployments.text.chat_template.CPU_S", 0.3)
    text = with_template(ENDLESS)

    async def go():
        rendering = asyncio.ensure_future(text.encode([Conversation(TURNS)]))
        turns = 0
        while not rendering.done():
            turns += 1
            await asyncio.sleep(0.01)
        assert isinstance(rendering.exception(), ConversationError)
        return turns

    assert asyncio.run(go()) >= 10


def test_a_template_that_never_ends_is_found_before_anything_is_served(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("deployments.text.chat_template.CPU_S", 0.2)
    folder = shutil.copytree(tokenizer_folder, tmp_path / "endless")
    (folder / "chat_template.jinja").write_text(ENDLESS)
    with pytest.raises(ValueError, match="chat template needs more than"):
        Text.load(folder)


def test_a_checkpoint_without_a_chat_template_says_so_at_the_start(tokenizer_folder, tmp_path, caplog):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with caplog.at_level("INFO", "deployments"):
        text = Text.load(folder)
    assert caplog.messages == ["the checkpoint has no chat template: chats are refused, /v1/completions answers"]
    with pytest.raises(ConversationError, match="no chat template; use /v1/completions"):
        encode(text, Conversation([{"role": "user", "content": "fox"}]))


@pytest.mark.parametrize("left", [None, "", '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_tokenizer_that_is_not_there_or_broken_is_one_line(tokenizer_folder, tmp_path, left):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "broken")
    (folder / "tokenizer.json").unlink()
    if left is not None:
        (folder / "tokenizer.json").write_text(left)
    with pytest.raises(ValueError, match=r"holds no tokenizer .*; copy tokenizer\.json and tokenizer_config") as raised:
        Text.load(folder)
    assert str(raised.value).startswith(f"{folder}: ") and "\n" not in str(raised.value)


def test_the_process_of_a_template_ends_with_its_parent():
    program = (
        "from deployments.text.chat_template import ChatTemplate\n"
        "template = ChatTemplate('x', {})\n"
        "template.check()\n"
        "import os; print(template._process.pid, flush=True); os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60).stdout)
    until(lambda: not is_alive(pid), within_s=10)


def test_developer_is_system_for_templates_that_do_not_know_it(text, with_template):
    def ids(reader, role):
        return encode(reader, Conversation([{"role": role, "content": "be brief"}]))

    assert ids(text, "developer") == ids(text, "system")
    modern = with_template("{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{{ m.role }}{% endfor %}")
    assert ids(modern, "developer") != ids(modern, "system")


def test_a_template_prints_the_date_that_it_is_told():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, datetime(2020, 2, 3, tzinfo=UTC))
    assert template.render(Conversation([{"role": "user", "content": "x"}])) == "03 Feb 2020"
    template.close()


def test_a_model_without_a_template_refuses_chats(with_template):
    with pytest.raises(ConversationError, match="/v1/completions"):
        encode(with_template(None), Conversation(TURNS))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[7].content.x }}", "{{ x.y.z }}", "{% if %}"])
def test_a_template_that_fails_is_the_clients_error(with_template, template):
    with pytest.raises(ConversationError):
        encode(with_template(template), Conversation(TURNS))


def test_end_of_sequence_ids_come_from_checkpoint_and_tokenizer(text):
    assert text.eos_token_ids == {1, 2}


# --- decoding -------------------------------------------------------------------------------------------------------


def byte_level():
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    """As Llama 2 and Gemma have it: spaces are ▁, unknown characters are bytes, a space at the start is dropped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefgh", "▁the", "▁dog", "é"]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}
SAMPLES = ["héllo 你好 👋🏽 ñandú", "👨‍👩‍👧‍👦" * 5, "a\u0301 b", " the dog", "日本語" * 20, "\ufffd x \ufffd\ufffd"]


def decode_all(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_pieces_join_to_the_text_and_hold_no_half_character(name, sample):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(sample).ids
    decoder = Decoder(decode_all(tokenizer))
    pieces = [decoder.push(token) for token in ids] + [decoder.flush()]
    text = tokenizer.decode(ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_mixture_joins_to_its_text(name, seed):
    tokenizer = TOKENIZERS[name]()
    world = random.Random(seed)
    characters = "".join(world.choices(" abé你👋\u0301", k=40))
    ids = tokenizer.encode(characters).ids
    for _ in range(world.randint(0, 5)):  # special ids may come in between, and are skipped
        if name == "byte_fallback":
            ids.insert(world.randint(0, len(ids)), world.choice([1, 2]))
    decoder = Decoder(decode_all(tokenizer), frozenset({1, 2}) if name == "byte_fallback" else frozenset())
    text = ""
    for token in ids:
        text += decoder.push(token)
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith(text)
    assert text + decoder.flush() == tokenizer.decode(ids, skip_special_tokens=True)
    cut = world.randint(0, len(ids))
    again = Decoder(decode_all(tokenizer), decoder.special_texts)
    assert "".join(map(again.push, ids[:cut])) + again.finish(ids[cut:]) == tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(30))
def test_bytes_that_are_no_text_come_out_as_decoding_shows_them(seed):
    tokenizer = byte_level()
    world = random.Random(seed)
    ids = world.choices(range(256), k=200)
    decoder = Decoder(decode_all(tokenizer))
    text = "".join(decoder.push(token) for token in ids) + decoder.flush()
    assert text == tokenizer.decode(ids) == Decoder(decode_all(tokenizer)).finish(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_work_per_token_is_constant_even_for_endless_nonsense(name):
    tokenizer = TOKENIZERS[name]()
    widths = []

    def decode(ids):
        widths.append(len(ids))
        return tokenizer.decode(ids, skip_special_tokens=True)

    continuation = 3 + 0x80 if name == "byte_fallback" else tokenizer.token_to_id("Ģ")
    decoder = Decoder(decode)
    pieces = [decoder.push(token) for token in [continuation] * 500 + tokenizer.encode("ab" * 250).ids]
    assert max(widths) < 40
    assert "".join(pieces) + decoder.flush() == "\ufffd" * 500 + "ab" * 250
    assert len(widths) <= 2 * 1000 + 1


def test_tokens_that_end_inside_characters_do_not_hold_back_the_whole_text():
    """Every token ends with the first byte of the next character, as merges across characters can make them."""
    raw = "你好世界" * 20
    data = raw.encode()
    tokens = [data[:1], *(data[place : place + 3] for place in range(1, len(data), 3))]

    def decode(ids):
        return b"".join(tokens[index] for index in ids).decode("utf-8", "replace")

    decoder = Decoder(decode)
    shown = ""
    for index in range(len(tokens)):
        shown += decoder.push(index)
        assert len(shown) == index
    assert shown + decoder.flush() == raw


# --- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_stop_strings_against_searching_the_whole_text(seed):
    world = random.Random(seed)
    text = "".join(world.choices("ab", k=30))
    stops = ["".join(world.choices("ab", k=world.randint(1, 7))) for _ in range(world.randint(1, 4))]
    watcher = StopStrings(stops)
    shown, place = "", 0
    while place < len(text) and not watcher.is_found:
        size = world.randint(1, 3)
        shown += watcher.push(text[place : place + size])
        place += size
        seen = text[:place]
        assert watcher.is_found == any(stop in seen for stop in stops)
        if not watcher.is_found:  # what is held back is a beginning of a stop string, and as little as possible
            held = seen[len(shown) :]
            longest = max((n for n in range(len(seen) + 1) if any(s[:n] == seen[len(seen) - n :] for s in stops if n < len(s))), default=0)  # fmt: skip  # noqa: E501
            assert seen.startswith(shown)
            assert len(held) == longest
    shown += "" if watcher.is_found else watcher.flush()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(found)[1]] if found else text)


@pytest.mark.parametrize(("stops", "shown"), [(["abcd", "c"], "xab"), (["bc", "c"], "xa"), (["c", "abc"], "x")])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_of_several_stop_strings_the_one_completed_first_wins_however_the_text_is_cut(stops, shown, size):
    watcher, text = StopStrings(stops), "xabcde"
    assert "".join(watcher.push(text[at : at + size]) for at in range(0, len(text), size)) == shown


def test_transcript_counts_up_to_the_id_that_completed_the_stop_string(text):
    ids = encode(text, "one two three")
    after = encode(text, " four")
    transcript = text.transcript(["three"])
    assert transcript.push([*ids, *after], None) == "one two "
    assert transcript.finish_reason == "stop"
    assert transcript.num_tokens <= len(ids)
    assert "three" in text._decode(ids[: transcript.num_tokens])


def test_transcript_shows_what_was_held_when_the_sequence_ends(text):
    ids = encode(text, "one two thr")
    transcript = text.transcript(["three"])
    assert transcript.push(ids[:-1]) + transcript.push(ids[-1:], "length") == "one two thr"
    assert transcript.finish_reason == "length"
    half = encode(text, "🦊")[:2]
    transcript = Transcript(Decoder(text._decode), [])
    assert transcript.push(half) == ""
    assert transcript.push(half, "length") == text._decode(half * 2)


def test_transcript_has_no_text_for_the_stop_id(text):
    ids = encode(text, "one")
    transcript = text.transcript([])
    assert transcript.push([*ids, 5], "stop") == "one"  # 5 would be text, were it not the stop id
    assert transcript.num_tokens == len(ids) + 1
