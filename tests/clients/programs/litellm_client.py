"""LiteLLM, as a provider of OpenAI's kind and of vLLM's: chat, stream, tools in two steps, a schema, an overflow."""

import json
from importlib.metadata import version

import litellm
from cases import CITY, DEGREES, HELLO, MODEL, PLACE, TOO_LONG, URL, WEATHER, run, user

litellm.suppress_debug_info = True
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": PLACE}}


def ask(content, provider="openai", **more):
    messages = [user(content)] if isinstance(content, str) else content
    model = f"{provider}/{MODEL}"
    return litellm.completion(model=model, api_base=URL, api_key="none", num_retries=0, messages=messages, **more)


def chat():
    for provider in ("openai", "hosted_vllm"):
        answer = ask("hello", provider)
        assert answer.choices[0].message.content == HELLO
        assert answer.usage.total_tokens > 2


def stream():
    chunks = list(ask("hello", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == HELLO
    assert chunks[-1].usage.completion_tokens > 1


def thinking():
    message = ask("think", "hosted_vllm").choices[0].message
    assert (message.reasoning_content.strip(), message.content) == ("Is it? It is.", "Yes.")


def tools():
    """Two steps, streamed."""
    messages = [user("weather")]
    whole = litellm.stream_chunk_builder(list(ask(messages, stream=True, tools=[WEATHER])), messages=messages)
    assert whole.choices[0].finish_reason == "tool_calls"
    (call,) = whole.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": CITY})
    result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
    messages += [whole.choices[0].message.model_dump(exclude_none=True), result]
    assert ask(messages, tools=[WEATHER]).choices[0].message.content == DEGREES


def schema():
    answer = ask("where?", response_format=SCHEMA).choices[0].message.content
    assert json.loads(answer)["city"] == CITY


def overflow():
    for provider in ("openai", "hosted_vllm"):
        try:
            ask(TOO_LONG, provider)
            raise AssertionError("it was taken")
        except litellm.ContextWindowExceededError as error:
            assert error.status_code == 400
    assert ask(TOO_LONG[:500]).choices[0].message.content == HELLO


def cancel():
    pieces = ask("count", stream=True)
    assert len([next(pieces) for _ in range(6)]) == 6
    pieces.completion_stream.response.close()


run(version("litellm"), chat, stream, thinking, tools, schema, overflow, cancel)
