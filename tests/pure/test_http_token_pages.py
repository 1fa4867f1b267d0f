"""/tokenize and /detokenize: the ids that an answer would start from, and back again."""

import asyncio

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from deployments.api import token_pages
from deployments.api.bodies import ChatBody
from deployments.api.token_pages import TokenizeBody
from deployments.text.tokenizer import INLINE_CHARS, Text

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("words", ["hello", "", "héllo 你好 👋 </s>", "x y " * INLINE_CHARS])
def test_tokenize_gives_the_tokenizers_ids_and_back(make_world, tokenizer, words):
    world = make_world(max_body_bytes=10**6)
    answer = world.post("/tokenize", {"prompt": words}).json()
    tokenizer.backend_tokenizer.no_truncation()
    assert answer == {"tokens": tokenizer(words).input_ids, "count": len(answer["tokens"]), "max_model_len": 128}
    assert world.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": words}


def test_tokenize_counts_what_a_chat_counts(world):
    answer = world.post("/tokenize", {"model": "tiny", "messages": MESSAGES}).json()
    chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    assert answer["count"] == world.post("/v1/chat/completions", chat).json()["usage"]["prompt_tokens"]
    back = world.post("/detokenize", {"model": "tiny", "tokens": answer["tokens"]}).json()
    assert back == {"prompt": "<s><|user|>hello\n<|assistant|>"}


def test_special_tokens_are_a_choice(make_world, tokenizer_folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    world = make_world()
    world.service.text = Text(tokenizer)
    plain = world.post("/tokenize", {"prompt": "hello", "add_special_tokens": False}).json()["tokens"]
    assert world.post("/tokenize", {"prompt": "hello"}).json()["tokens"] == [0, *plain]
    assert world.post("/tokenize", {"prompt": "hello", "add_special_tokens": True}).json()["tokens"] == [0, *plain]


def test_a_chats_fields_reach_the_template_of_tokenize_as_well():
    tools = [{"function": {"name": "f"}}]
    for fields in ({"reasoning_effort": "none"}, {"tools": tools}, {"tools": tools, "tool_choice": "none"}):
        chat = ChatBody.model_validate({"model": "tiny", "messages": MESSAGES, **fields}).prompts
        assert [TokenizeBody.model_validate({"messages": MESSAGES, **fields}).text_or_messages] == chat


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": 1}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "documents": [{"text": "a"}]}, "documents"),
        ("/tokenize", {"prompt": "x", "reasoning_effort": "low"}, "reasoning_effort"),
        ("/tokenize", {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [400]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["5"]}, "tokens"),
        ("/detokenize", {"tokens": "5"}, "tokens"),
    ],
)
def test_wrong_bodies_are_refused_by_name(world, error_of, path, body, param):
    error = error_of(world.post(path, body), 400)
    assert error["param"] == param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": []})])
def test_other_models_methods_and_contents_are_refused(world, error_of, path, body):
    assert error_of(world.post(path, {**body, "model": "nope"}), 404)["code"] == "model_not_found"
    error_of(world.get(path), 405)
    error_of(world.post(path, raw=b"[]"), 400)
    error_of(world.post(path, body, headers={"content-type": "text/plain"}), 415)
    error_of(world.post(path, raw=b" " * 70_000), 413)


def test_no_engine_is_needed(world):
    world.engine.close()
    assert world.post("/tokenize", {"prompt": "hello"}).status_code == 200
    assert world.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_one_text_at_a_time_is_tokenized_and_only_so_many_wait(make_world, error_of, monkeypatch):
    """So a prompt of a completion waits behind one of them, not behind all."""
    monkeypatch.setattr(token_pages, "MAX_AT_ONCE", 3)
    world, at_once, most = make_world(), [], []

    async def encode(prompts, add_special_tokens):
        at_once.append(prompts)
        most.append(len(at_once))
        await asyncio.sleep(0.01)
        at_once.pop()
        return [[5]]

    monkeypatch.setattr(world.service, "encode", encode)

    async def go():
        async with world.http() as client:
            return await asyncio.gather(*(client.post("/tokenize", json={"prompt": "hello"}) for _ in range(5)))

    answers = asyncio.run(go())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 503, 503]
    assert max(most) == 1
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert error_of(refused, 503)["code"] == "server_overloaded" and refused.headers["retry-after"] == "1"
    assert world.post("/tokenize", {"prompt": "hello"}).status_code == 200


def test_the_tokenizers_pages_have_a_deadline(make_world, error_of, monkeypatch):
    world = make_world(request_s=0.02)

    async def encode(prompts, add_special_tokens):
        await asyncio.sleep(20)

    monkeypatch.setattr(world.service, "encode", encode)
    error_of(world.post("/tokenize", {"prompt": "hello"}), 504)
