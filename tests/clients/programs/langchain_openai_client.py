"""LangChain's ChatOpenAI: invoke, stream, tools in two steps, structured output, an overflow, a cancel."""

from importlib.metadata import version

import openai
from cases import CITY, COUNTRY, DEGREES, HELLO, MODEL, TOO_LONG, URL, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", max_retries=0, stream_usage=True)


class Place(BaseModel):
    """A place."""

    city: str
    country: str


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"21 in {city}"


def chat():
    answer = model.invoke("hello")
    assert answer.content == HELLO
    assert answer.usage_metadata["total_tokens"] > 2
    assert answer.response_metadata["finish_reason"] == "stop"


def stream():
    chunks = list(model.stream("hello"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == HELLO
    assert whole.usage_metadata["output_tokens"] > 1


def tools():
    """Two steps, streamed."""
    bound, messages = model.bind_tools([weather]), [HumanMessage("weather")]
    chunks = list(bound.stream(messages))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": CITY})
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert bound.invoke([*messages, whole, result]).content == DEGREES


def schema():
    for method in ("json_schema", "function_calling"):
        answer = model.with_structured_output(Place, method=method).invoke("where?")
        assert answer == Place(city=CITY, country=COUNTRY), method


def overflow():
    try:
        model.invoke(TOO_LONG)
        raise AssertionError("it was taken")
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"
        assert "ContextOverflow" in type(error).__name__, type(error)  # LangChain's own, by the words
    assert model.invoke(TOO_LONG[:500]).content == HELLO


def cancel():
    pieces = model.stream("count")
    assert len([next(pieces) for _ in range(6)]) == 6
    pieces.close()


run(version("langchain-openai"), chat, stream, tools, schema, overflow, cancel)
