"""Requests drawn at random: none makes the server fail, and none leaves anything behind."""

import asyncio
import json

import pytest

from tests.fuzz import requests


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 300), pytest.param(2, 10_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_no_request_makes_the_server_fail(make_world, error_of, seed, count):
    world = make_world()
    seen: dict[int, int] = {}

    async def go():
        async with world.http() as client:
            for drawn in requests(seed, count):
                headers = {name.encode(): value.encode() for name, value in drawn.headers.items()}
                answer = await client.request(drawn.method, drawn.path, content=drawn.body, headers=headers)
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                assert answer.status_code < 500, (drawn, answer.text[:500])
                if answer.status_code >= 400 and drawn.method != "HEAD":
                    error_of(answer, answer.status_code)
                elif answer.headers.get("content-type", "").startswith("text/event-stream"):
                    assert _ends_well(answer.text), (drawn, answer.text[-500:])

    asyncio.run(go())
    world.wait_until_idle()
    assert world.outbox._mailboxes == {}
    assert (world.engine.state, world.engine.snapshot().epoch) == ("ready", 0)
    assert min(seen[200], seen[400]) > count / 10, seen  # some are taken, and some refused


def _ends_well(text):
    """A stream ends with [DONE], or with the error of a deadline that its request has asked for."""
    last = text.strip().rpartition("\n\n")[2].removeprefix("data: ")
    return last == "[DONE]" or json.loads(last)["error"]["code"] == "timeout"
