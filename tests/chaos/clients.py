"""Clients: ask over HTTP, alone or as a crowd that never stops asking, and keep the history of every request."""

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.chaos.histories import Golden, History, golden_of

READ_S = 120.0  # without a byte, not even a comment: something is broken
_LINE_ENDS = b"\n"


@dataclass(frozen=True)
class Question:
    """A request that may be asked again and again."""

    name: str
    route: str
    body: dict[str, Any]


def questions(model: str, seed: int = 0, max_tokens: tuple[int, int] = (80, 240)) -> dict[str, list[Question]]:
    """What a crowd asks: greedy streams (every other one tells its tokens), plain requests, and seeded ones.

    Half of the seeded have a grammar.
    """
    chance = random.Random(seed)

    def one(kind: str, number: int) -> Question:
        body: dict[str, Any] = {
            "model": model,
            "prompt": [chance.randrange(3, 1000) for _ in range(chance.choice((3, 12, 40, 100)))],
            "max_tokens": chance.randint(*max_tokens),
            "ignore_eos": True,
            "temperature": 0,
        }
        if kind == "seeded":
            body |= {"temperature": 1.0, "seed": chance.randrange(2**31), "top_p": 0.95}
        if kind == "seeded" and number >= 2:
            del body["ignore_eos"]  # a grammar says itself where the text ends
            body |= {"structured_outputs": {"regex": "([A-Z]?[a-z]+[,.]? ?|[0-9]{2,5} )+!"}}
        if kind != "plain":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if kind == "stream" and number % 2:
            body |= {"logprobs": 0}
        return Question(f"{kind} {number}", "/v1/completions", body)

    counts = {"stream": 12, "plain": 4, "seeded": 4}
    return {kind: [one(kind, number) for number in range(count)] for kind, count in counts.items()}


async def ask(http: httpx.AsyncClient, question: Question, history: History) -> History:
    """Ask, and write down every line the moment it is here. Never raises what the server or the network does."""
    try:
        async with http.stream("POST", question.route, json=question.body) as response:
            history.status = response.status_code
            if not (history.is_stream and response.headers.get("content-type", "").startswith("text/event-stream")):
                body = await response.aread()
                history.lines.append((time.monotonic(), body.decode()))
                return history
            rest = b""
            async for piece in response.aiter_raw():
                now = time.monotonic()
                *lines, rest = (rest + piece).split(_LINE_ENDS)
                history.lines += [(now, line.decode()) for line in lines if line]
            if rest:
                history.lines.append((time.monotonic(), rest.decode()))
    except httpx.TransportError as error:
        history.lost = f"{type(error).__name__}: {error}"
    finally:
        history.ended_at = time.monotonic()
    return history


def client(url: str) -> httpx.AsyncClient:
    """For many requests at once, without a retry."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(30.0, read=READ_S), limits=limits)


def ask_all(url: str, asked: list[Question], at_once: int = 1) -> list[History]:
    """Histories in the order of the questions."""

    async def run() -> list[History]:
        doors = asyncio.Semaphore(at_once)
        async with client(url) as http:

            async def one(question: Question) -> History:
                async with doors:
                    return await ask(http, question, History(question.name, question.body, time.monotonic()))

            return await asyncio.gather(*map(one, asked))

    return asyncio.run(run())


def goldens(url: str, asked: list[Question]) -> dict[str, Golden]:
    """By name, what each question gets of a server that nobody disturbs."""
    return {history.name: golden_of(history) for history in ask_all(url, asked, at_once=8)}


class Crowd:
    """Clients in a thread of their own. `histories` grows while they ask; what is in flight has no `ended_at` yet."""

    def __init__(self, url: str, seed: int = 0) -> None:
        self.histories: list[History] = []
        self._url = url
        self._chance = random.Random(seed)
        self._is_over = False
        self._loop = asyncio.new_event_loop()
        self._tasks: list[Any] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd", daemon=True)
        self._thread.start()
        self._http = client(url)

    def circle(self, asked: list[Question], num_clients: int) -> None:
        """Add clients that each ask one question after another, without a pause."""
        turns = itertools.cycle(asked)
        for _ in range(num_clients):
            self._spawn(self._ask_on(turns))

    def arrive(self, asked: list[Question], per_s: float) -> None:
        """Ask at random moments (Poisson), whether or not earlier answers are complete."""
        self._spawn(self._arrive(asked, per_s))

    def ask(self, question: Question) -> History:
        """Ask once; the history fills meanwhile."""
        history = self._begin(question)
        self._spawn(ask(self._http, question, history))
        return history

    def stop(self, patience_s: float = 180.0) -> list[History]:
        """Ask nothing more, wait until every answer has ended, and return all histories."""
        self._is_over = True
        for task in self._tasks:
            task.result(patience_s)
        asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        return self.histories

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        self._tasks.append(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _begin(self, question: Question) -> History:
        history = History(question.name, question.body, time.monotonic())
        self.histories.append(history)
        return history

    async def _ask_on(self, turns: Iterator[Question]) -> None:
        while not self._is_over:
            question = next(turns)
            history = await ask(self._http, question, self._begin(question))
            if history.status != 200:
                await asyncio.sleep(0.2)  # refused: not at once again

    async def _arrive(self, asked: list[Question], per_s: float) -> None:
        under_way: set[asyncio.Task[History]] = set()
        while not self._is_over:
            await asyncio.sleep(self._chance.expovariate(per_s))
            question = self._chance.choice(asked)
            under_way.add(asyncio.create_task(ask(self._http, question, self._begin(question))))
            under_way = {task for task in under_way if not task.done()}
        if under_way:
            await asyncio.wait(under_way)


@contextlib.contextmanager
def crowd(url: str, seed: int = 0) -> Iterator[Crowd]:
    """A crowd that is stopped in any case."""
    people = Crowd(url, seed)
    try:
        yield people
    finally:
        if not people._is_over:
            people.stop()
