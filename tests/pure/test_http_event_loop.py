"""What takes long is done aside from the event loop: no step of it takes as long as a large request's work does.

A step is measured in processor time of the loop's thread, which other processes of the machine do not lengthen, beside
the same work done at once in the test.
"""

import asyncio
import contextlib
import http.client
import json
import threading
import time

import pytest

from deployments.api.bodies import CompletionBody
from deployments.api.responses import CompletionReply
from deployments.api.strict_body import parse_body

NUM_IDS, NUM_CHARS = 300_000, 400_000


@pytest.fixture(scope="module")
def world(text, world_type):
    world = world_type(text, max_body_bytes=1 << 22)
    yield world
    world.close()


@pytest.fixture(scope="module")
def address(world):
    with world.serve("asyncio") as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def post(address, path, body):
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


@contextlib.contextmanager
def steps():
    """The processor time of each step of every event loop but that of this thread, in seconds."""
    here, taken, run = threading.get_ident(), [], asyncio.Handle._run

    def timed(handle):
        began = time.thread_time()
        run(handle)
        if threading.get_ident() != here:
            taken.append(time.thread_time() - began)

    asyncio.Handle._run = timed
    try:
        yield taken
    finally:
        asyncio.Handle._run = run


def cost(work):
    """Processor time of a work done here; the least of three."""
    times = []
    for _ in range(3):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def test_a_large_body_is_read_aside(address):
    body = {"model": "tiny", "max_tokens": 1, "prompt": [*range(5, 205)] * (NUM_IDS // 200)}
    raw = json.dumps(body).encode()
    at_once = cost(lambda: parse_body(raw, CompletionBody))
    with steps() as taken:
        status, answer = post(address, "/v1/completions", body)
    assert status == 400 and b"context_length_exceeded" in answer
    assert max(taken) < at_once / 2, (sorted(taken)[-3:], at_once)


def test_a_long_text_is_tokenized_and_told_aside(world, address):
    body = {"prompt": "one two " * (NUM_CHARS // 8), "return_token_strs": True}
    with steps() as taken:
        status, answer = post(address, "/tokenize", body)
    tokens = json.loads(answer)["tokens"]
    at_once = cost(lambda: world.text.names(tokens))
    assert status == 200 and len(tokens) > NUM_CHARS / 8
    assert max(taken) < at_once / 2, (sorted(taken)[-3:], at_once)


@pytest.mark.parametrize("num_answers", [1, 16])
def test_large_answers_are_written_aside(address, monkeypatch, num_answers):
    """Small ones are not: another thread would cost them a wait."""
    threads, whole = [], CompletionReply.whole

    def watched(*args):
        threads.append(threading.current_thread().name)
        return whole(*args)

    monkeypatch.setattr(CompletionReply, "whole", watched)
    fields = {"model": "tiny", "prompt": "a", "max_tokens": 100, "n": num_answers, "logprobs": 20, "ignore_eos": True}
    assert post(address, "/v1/completions", fields)[0] == 200
    assert threads[0].startswith("aside") == (num_answers == 16)
