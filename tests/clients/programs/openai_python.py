"""openai-python: chat, streams, `.parse`, tools in two steps, an overflow, a cancel."""

import openai
from cases import CITY, COUNTRY, DEGREES, HELLO, MODEL, TOO_LONG, URL, WEATHER, run, user
from pydantic import BaseModel

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
chats = client.chat.completions


class Place(BaseModel):
    city: str
    country: str


def chat():
    answer = chats.create(model=MODEL, messages=[user("hello")])
    assert answer.choices[0].message.content == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def stream():
    chunks = list(
        chats.create(model=MODEL, messages=[user("hello")], stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == HELLO
    assert chunks[-1].usage.completion_tokens > 1


def thinking():
    message = chats.create(model=MODEL, messages=[user("think")]).choices[0].message
    assert (message.reasoning_content.strip(), message.content) == ("Is it? It is.", "Yes.")


def tools():
    """Two steps, streamed: a call, its result, and words."""
    messages = [user("weather")]
    with chats.stream(model=MODEL, messages=messages, tools=[WEATHER]) as events:
        done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        first = events.get_final_completion().choices[0]
    assert [(event.name, event.parsed_arguments or event.arguments) for event in done], done
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
    messages += [first.message.model_dump(exclude_none=True), result]
    with chats.stream(model=MODEL, messages=messages, tools=[WEATHER]) as events:
        assert events.get_final_completion().choices[0].message.content == DEGREES


def schema():
    answer = chats.parse(model=MODEL, messages=[user("where?")], response_format=Place).choices[0].message
    assert answer.parsed == Place(city=CITY, country=COUNTRY)


def strict_tool():
    tool = openai.pydantic_function_tool(Place)
    answer = chats.parse(model=MODEL, messages=[user("where?")], tools=[tool], tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Place(city=CITY, country=COUNTRY)


def completion():
    answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=5, logprobs=2, echo=True)
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens


def overflow():
    try:
        chats.create(model=MODEL, messages=[user(TOO_LONG)])
        raise AssertionError("it was taken")
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"
        assert "maximum context length is 4096 tokens" in error.message
    assert chats.create(model=MODEL, messages=[user(TOO_LONG[:500])]).choices[0].message.content == HELLO


def cancel():
    with chats.create(model=MODEL, messages=[user("count")], stream=True) as events:
        said = "".join(next(events).choices[0].delta.content or "" for _ in range(6))
    assert "1 2".startswith(said[:3])


run(openai.__version__, chat, stream, thinking, tools, schema, strict_tool, completion, overflow, cancel)
