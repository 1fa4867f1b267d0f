"""The official client against the app behind uvicorn: what users and tools really send and expect."""

import asyncio
import socket
import threading
import time

import httpx
import openai
import pytest

from tests.serving import until

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "max_completion_tokens": 6,
}
COMPLETION = {"model": "tiny", "prompt": "one two", "temperature": 0, "max_tokens": 6}
IGNORE_EOS = {"ignore_eos": True}


@pytest.fixture
def served(make_world):
    world = make_world()
    with world.serve() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield world, url, client


def test_models(served):
    _, _, client = served
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "stagemesh"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("nope")
    assert raised.value.code == "model_not_found"


def test_completion_whole_and_streamed(served):
    world, _, client = served
    whole = client.completions.create(**COMPLETION, extra_body=IGNORE_EOS)
    prompt_ids = world.ids("one two")
    assert whole.choices[0].text == world.text._decode(world.expected_ids(prompt_ids, 6))
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 6
    chunks = list(
        client.completions.create(
            **COMPLETION, extra_body=IGNORE_EOS, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_chat_whole_and_streamed(served):
    _, _, client = served
    whole = client.chat.completions.create(**CHAT, extra_body=IGNORE_EOS)
    chunks = list(client.chat.completions.create(**CHAT, extra_body=IGNORE_EOS, stream=True))
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_the_clients_own_reader_of_streams(make_world):
    world = make_world(script=[40, 41, 42, 1])
    with world.serve() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with client.chat.completions.stream(**CHAT) as stream:
            choice = stream.get_final_completion().choices[0]
    assert (choice.message.content, choice.finish_reason) == (world.text._decode([40, 41, 42]), "stop")


def test_a_conversation_goes_on_with_the_clients_own_answer_objects(served):
    _, _, client = served
    first = client.chat.completions.create(**CHAT)
    messages = [*CHAT["messages"], first.choices[0].message, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(**{**CHAT, "messages": messages})
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


NEUTRAL = {
    "n": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "logprobs": None,
    "seed": None,
    "stop": None,
    "user": "somebody",
}
NEUTRAL_EXTRA = {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "min_tokens": 0, "stop_token_ids": []}


def test_neutral_values_of_real_clients_pass(served):
    _, _, client = served
    plain = client.chat.completions.create(**CHAT).choices
    chat_extra = {
        **NEUTRAL_EXTRA,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
    }
    chat_extra |= {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"}
    assert client.chat.completions.create(**CHAT, **NEUTRAL, extra_body=chat_extra).choices == plain
    extra = {**NEUTRAL_EXTRA, "echo": False, "best_of": 1, "suffix": None, "prompt_cache_key": "k"}
    answer = client.completions.create(**COMPLETION, **NEUTRAL, extra_body=extra)
    assert answer.choices == client.completions.create(**COMPLETION).choices


@pytest.mark.parametrize(
    "field",
    [
        "suffix",
        "use_beam_search",
        "prompt_embeds",
        "max_new_tokens",
        "tools",
    ],
)
def test_fields_that_would_mean_something_are_refused_by_name(served, field):
    _, _, client = served
    value = {"suffix": "x", "tools": [{}]}.get(field, 0.5)
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**COMPLETION, extra_body={field: value})
    assert raised.value.param == field
    assert raised.value.code in ("unsupported_parameter", "unknown_parameter")


def test_errors_are_the_clients_own_classes(served):
    world, _, client = served
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{**COMPLETION, "max_tokens": 1000})
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**COMPLETION, "model": "nope"})
    with world.service.admission.reserve(16), pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(**COMPLETION)
    assert raised.value.status_code == 503


def test_an_error_in_a_stream_raises_in_the_client(make_world, scripted_executor):
    executor = scripted_executor(range(40, 80), vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    with world.serve() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        threading.Thread(target=lambda: _release(executor, 3), daemon=True).start()
        stream = client.completions.create(**{**COMPLETION, "max_tokens": 30}, stream=True)
        next(stream)
        executor.fail(RuntimeError("boom"))
        with pytest.raises(openai.APIError, match="could not finish"):
            list(stream)


def _release(executor, count):
    while count:
        count -= executor.release()
        time.sleep(0.002)


def test_many_streams_at_once_equal_their_plain_answers(served):
    world, url, client = served

    def prompt(index):
        return [5, 6, index]

    golden = [
        client.completions.create(**{**COMPLETION, "prompt": prompt(index), "max_tokens": 40}).choices[0].text
        for index in range(16)
    ]

    async def go():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:

            async def one(index):
                body = {**COMPLETION, "prompt": prompt(index), "max_tokens": 40}
                stream = await many.completions.create(**body, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(16)))

    assert asyncio.run(go()) == golden
    world.wait_until_idle()


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_closed_socket_ends_the_request(make_world, scripted_executor, is_stream):
    executor = scripted_executor(range(40, 80), vocab_size=400, is_manual=True)
    world = make_world(executor=executor)
    with world.serve() as url:
        body = b'{"model":"tiny","prompt":[5],"max_tokens":30,"stream":%s}' % str(is_stream).lower().encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        with socket.create_connection(httpx.URL(url).netloc.decode().split(":")) as connection:
            connection.sendall(head % len(body) + body)
            _release(executor, 2)
            if is_stream:
                assert b"data: " in connection.recv(65536)
            assert world.engine.snapshot().running == 1
        until(lambda: world.service.admission.num_admitted == 0, within_s=20, every_s=0.005)
        executor.release(100)
        world.wait_until_idle()


def test_a_connection_serves_one_request_after_the_other(served):
    _, url, _ = served
    with httpx.Client(base_url=url) as client:
        for _ in range(3):
            assert client.post("/v1/completions", json=COMPLETION).status_code == 200
            assert client.post("/v1/completions", json={**COMPLETION, "stream": True}).text.endswith("data: [DONE]\n\n")
            assert client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).is_error
            assert client.get("/health").status_code == 200
