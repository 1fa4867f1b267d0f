"""pydantic-ai: an agent that answers, streams, calls tools and gives typed outputs; an overflow, a cancel."""

import asyncio

import pydantic_ai
from cases import CITY, COUNTRY, DEGREES, HELLO, MODEL, TOO_LONG, URL, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))


class Place(BaseModel):
    city: str
    country: str


async def _chat():
    answer = await Agent(model).run("hello")
    assert answer.output == HELLO
    assert answer.usage.output_tokens > 1


async def _stream():
    async with Agent(model).run_stream("hello") as answer:
        assert "".join([piece async for piece in answer.stream_text(delta=True)]) == HELLO


async def _tools():
    """Two steps, streamed, of which the agent itself does the first."""
    agent, called = Agent(model), []

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        called.append(city)
        return "21"

    async with agent.run_stream("weather") as answer:
        assert await answer.get_output() == DEGREES
    assert called == [CITY]


async def _schema():
    for output in (NativeOutput(Place), ToolOutput(Place)):
        answer = await Agent(model, output_type=output).run("where?")
        assert answer.output == Place(city=CITY, country=COUNTRY), output


async def _overflow():
    try:
        await Agent(model).run(TOO_LONG)
        raise AssertionError("it was taken")
    except ModelHTTPError as error:
        assert (error.status_code, error.body["code"]) == (400, "context_length_exceeded")
    assert (await Agent(model).run(TOO_LONG[:500])).output == HELLO


async def _cancel():
    async with Agent(model).run_stream("count") as answer:
        async for piece in answer.stream_text(delta=True, debounce_by=None):
            assert piece.startswith("1")
            break


def case(work):
    def one():
        asyncio.run(work())

    one.__name__ = work.__name__.strip("_")
    return one


run(pydantic_ai.__version__, *map(case, (_chat, _stream, _tools, _schema, _overflow, _cancel)))
