"""instructor: typed answers by each of its modes that the server has, streamed ones, and an overflow."""

from importlib.metadata import version

import instructor
import openai
from cases import CITY, COUNTRY, MODEL, TOO_LONG, URL, run, user
from pydantic import BaseModel

PLAIN = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)


class Place(BaseModel):
    city: str
    country: str


EXPECTED = {"city": CITY, "country": COUNTRY}


def client(mode):
    return instructor.from_openai(PLAIN, mode=mode)


def ask(mode, content="where?", **more):
    options = {"model": MODEL, "response_model": Place, "max_retries": 0, "messages": [user(content)]}
    return client(mode).create(**options, **more).model_dump()


def tools():
    """One of them: the model is made to call it."""
    assert ask(instructor.Mode.TOOLS) == EXPECTED


def strict_tools():
    assert ask(instructor.Mode.TOOLS_STRICT) == EXPECTED


def schema():
    assert ask(instructor.Mode.JSON_SCHEMA) == EXPECTED


def json_object():
    assert ask(instructor.Mode.JSON) == EXPECTED


def partial():
    """Streamed: objects that grow."""
    options = {"model": MODEL, "response_model": Place, "messages": [user("where?")]}
    grown = list(client(instructor.Mode.TOOLS).create_partial(**options))
    assert grown[-1].model_dump() == EXPECTED


def overflow():
    try:
        ask(instructor.Mode.TOOLS, TOO_LONG)
        raise AssertionError("it was taken")
    except Exception as error:
        assert "maximum context length is 4096 tokens" in str(error), error
    assert ask(instructor.Mode.TOOLS, TOO_LONG[:500]) == EXPECTED


run(version("instructor"), tools, strict_tools, schema, json_object, partial, overflow)
