"""What reaches the chat template, and how: parts, answers that go on with a message, documents; beside Transformers."""

import asyncio
import json

import pytest
from transformers import PreTrainedTokenizerFast

from deployments.text.prompts import Conversation, ConversationError
from deployments.text.tokenizer import Text

CHATS = "/v1/chat/completions"
USER = {"role": "user", "content": "the lazy dog"}
HALF = {"role": "assistant", "content": "one two"}
CHAT = {"model": "tiny", "messages": [USER, HALF], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

# as of models that see images, which read both; as older ones of them, which read parts alone; and as of all others
BOTH = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p['type'] == 'image' %}<image>{% elif p['type'] == 'text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARTS_ALONE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OF_USERS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' and m.content is not string %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
TEXT_ALONE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.type }}{{ m.text }};{% endfor %}"


@pytest.fixture(scope="module")
def with_template(tokenizer_folder):
    """Gives a tokenizer and a Text with another chat template; its process is ended afterwards."""
    made = {}

    def make(template):
        if template not in made:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))
            tokenizer.chat_template = template
            made[template] = tokenizer, Text(tokenizer)
        return made[template]

    yield make
    for _, text in made.values():
        text.close()


def rendered(text, *messages, **options):
    return text._render(Conversation(list(messages), **options))


def test_parts_reach_a_template_that_reads_them_as_transformers_hands_them_on(with_template):
    for template in (BOTH, PARTS_ALONE):
        tokenizer, text = with_template(template)
        messages = [{"role": "system", "content": PARTS}, {"role": "user", "content": PARTS}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered(text, *messages) == expected == "<|system|>onetwo;<|user|>onetwo;<|assistant|>"


def test_a_text_becomes_a_part_where_the_template_reads_nothing_else(with_template):
    _, text = with_template(PARTS_ALONE)
    assert rendered(text, USER, HALF) == "<|user|>the lazy dog;<|assistant|>one two;<|assistant|>"


def test_parts_become_a_text_where_the_template_does_not_read_them(with_template, text):
    _, other = with_template(TEXT_ALONE)
    messages = [{"role": "user", "content": PARTS}]
    assert rendered(other, *messages) == "<|user|>one\ntwo;"
    assert rendered(text, *messages) == "<s><|user|>one\ntwo\n<|assistant|>"
    _, of_users = with_template(OF_USERS)
    both = [{"role": "system", "content": PARTS}, {"role": "user", "content": PARTS}]
    assert rendered(of_users, *both) == "<|system|>one\ntwo<|user|>onetwo"


@pytest.mark.parametrize("template", [BOTH, PARTS_ALONE, TEXT_ALONE, None])
def test_an_answer_goes_on_with_the_last_message_as_transformers_has_it(with_template, text, tokenizer, template):
    if template is not None:
        tokenizer, text = with_template(template)
    content = HALF["content"] if template is not PARTS_ALONE else [{"type": "text", "text": HALF["content"]}]
    users = USER["content"] if template is not PARTS_ALONE else [{"type": "text", "text": USER["content"]}]
    messages = [{**USER, "content": users}, {**HALF, "content": content}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert rendered(text, USER, HALF, begins_answer=False, continues_message=True) == expected
    assert expected.endswith("one two")
    plain = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert rendered(text, USER, HALF, begins_answer=False) == plain


def test_what_cannot_go_on_is_refused(with_template, text):
    _, shouting = with_template("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    for reader, messages, words in (
        (shouting, [USER, HALF], "does not show the last message"),
        (text, [USER, {"role": "assistant", "content": None, "reasoning": "x"}], "no text to go on with"),
    ):
        with pytest.raises(ConversationError, match=words) as raised:
            rendered(reader, *messages, begins_answer=False, continues_message=True)
        assert "lazy" not in str(raised.value)


def test_the_text_goes_on_and_an_echo_shows_what_it_goes_on_with(make_world):
    world = make_world()
    after = world.ids(" three")
    world = make_world(script=[*after, 2])
    body = {**CHAT, "continue_final_message": True, "ignore_eos": False, "return_token_ids": True}
    for echo, expected in ((False, " three"), (True, "one two three")):
        answer = world.post(CHATS, {**body, "echo": echo}).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
        assert world.text._decode(answer["prompt_token_ids"]).endswith("one two")
        stream = world.post(CHATS, {**body, "echo": echo, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


def test_an_echo_shows_a_last_message_of_the_answers_role_alone(make_world):
    world = make_world(script=[40, 2])
    answer = world.text._decode([40])
    body = {**CHAT, "echo": True, "ignore_eos": False}
    for messages, more, role, expected in (
        ([USER], {}, "assistant", answer),
        ([USER, HALF], {}, "assistant", "one two" + answer),
        ([USER], {"continue_final_message": True}, "user", "the lazy dog" + answer),
    ):
        message = world.post(CHATS, {**body, "messages": messages, **more}).json()["choices"][0]["message"]
        assert message == {"role": role, "content": expected}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": True, "messages": [USER, {"role": "assistant"}]}, "messages"),
        ({"continue_final_message": "yes"}, "continue_final_message"),
        ({"documents": [{"title": "a", "text": "b"}]}, "documents"),
        ({"documents": ["x"]}, "documents.0"),
        ({"chat_template": "x"}, "chat_template"),
        ({"messages": [{**USER, "prefix": True}]}, "messages.0.prefix"),
    ],
)
def test_what_contradicts_or_has_no_effect_is_refused(world, error_of, fields, param):
    assert error_of(world.post(CHATS, {**CHAT, **fields}), 400)["param"] == param


def test_a_probe_whose_process_ended_is_tried_again(with_template, monkeypatch):
    _, text = with_template(PARTS_ALONE + " ")
    with monkeypatch.context() as patch:
        patch.setattr("deployments.text.limited_process.LimitedProcess.ask", lambda *_: None)
        with pytest.raises(ConversationError, match="takes too long"):
            rendered(text, USER)
    assert "the lazy dog" in rendered(text, USER)


def test_documents_reach_a_template_that_reads_them(with_template):
    template = "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}{{ messages[0].content }}"
    tokenizer, text = with_template(template)
    documents = [{"title": "fox", "text": "quick </s>"}]
    expected = tokenizer.apply_chat_template([USER], tokenize=False, documents=documents)
    assert rendered(text, USER) == USER["content"]
    (ids,) = asyncio.run(text.encode([Conversation([USER], documents=documents)]))
    assert text._decode(ids, skip_special_tokens=False) == expected and 1 not in ids


def test_tokenize_reads_the_same_fields_and_names_tokens(world):
    path, messages = "/tokenize", [USER, HALF]
    for fields in ({"continue_final_message": True}, {"add_generation_prompt": False}, {}):
        told = world.post(path, {"messages": messages, "return_token_strs": True, **fields}).json()
        asked = world.post(CHATS, {**CHAT, **fields, "return_token_ids": True}).json()
        assert told["tokens"] == asked["prompt_token_ids"]
        assert told["token_strs"][0] == "<s>" and len(told["token_strs"]) == told["count"]
    assert "token_strs" not in world.post(path, {"messages": messages}).json()


def test_the_tokenizer_says_what_it_is(world, tokenizer, tokenizer_folder):
    response = world.get("/tokenizer_info")
    info = response.json()
    assert (info["bos_token"], info["eos_token"], info["eos_token_id"]) == ("<s>", "</s>", 1)
    assert (info["chat_template"], info["vocab_size"], info["max_model_len"]) == (
        tokenizer.chat_template,
        len(tokenizer),
        128,
    )
    assert info["end_token_ids"] == [1, 2] and str(tokenizer_folder) not in response.text


def test_messages_as_clients_keep_them(world):
    """Each beside what it means; see also the templates of tests/pure/test_http_tools.py."""

    def ids(*messages):
        response = world.post("/tokenize", {"messages": list(messages)})
        assert response.status_code == 200, response.text
        return response.json()["tokens"]

    plain = ids(USER, HALF, USER)
    one_part = {"role": "assistant", "content": [{"type": "text", "text": "one two"}]}
    assert ids(USER, one_part, USER) == plain
    for kind in ("input_text", "output_text"):
        assert ids(USER, {"role": "assistant", "content": [{"type": kind, "text": "one two"}]}, USER) == plain
    refused = {"role": "assistant", "content": None, "refusal": "one two", "annotations": [{"type": "url"}]}
    assert ids(USER, refused, USER) == plain
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "one two"}]}
    assert ids(USER, part, USER) == plain
    empty = ids(USER, {"role": "assistant", "content": ""}, USER)
    assert ids(USER, {"role": "assistant", "content": None}, USER) == empty == ids(USER, {"role": "assistant"}, USER)
    assert ids({"role": "developer", "content": "x"}, USER) == ids({"role": "system", "content": "x"}, USER)
    assert ids({**USER, "name": "fox"}) == ids(USER)
