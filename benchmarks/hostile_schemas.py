"""What schemas that mean harm cost the streams beside them: ITL with and without, in turn, in one run.

    python benchmarks/hostile_schemas.py http://127.0.0.1:8000 --model stagemesh-demo --rounds 6 --seconds 10

Needs a server that runs, best with one shard and one stage, so that a processor is left for the compilers. Golden
streams ask for plain answers of a fixed length; in every other round, half of the senders ask for schemas that explode,
each time others, and half for long answers to an expression that is let in and whose masks are dear. The figure is the
ratio of the p99 of ITL of all rounds with to that of all rounds without; the last line is JSON. Beside it: what the
senders were told.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp

NUMBERS = itertools.count()


def hostile_schema() -> dict[str, Any]:
    """One that no cache knows; the compilers need all the time that they get for some of them."""
    number = next(NUMBERS)
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "multipleOf": 999_983, "minimum": -(10**18), "maximum": 10**18},
        {"enum": [f"value {at} of {number}" for at in range(20_000)]},
        {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(3000)}},
        {"$ref": "#"},
        {"type": "string", "pattern": f".*a.{{{400 + number % 50}}}", "maxLength": 10**5},
        {"allOf": [{"anyOf": [{"properties": {f"{at}{way}": {}}} for at in range(10)]} for way in range(10)]},
    ]
    return {"title": str(number), **kinds[number % len(kinds)]}


def dear_masks() -> dict[str, Any]:
    """An answer that is let in: every mask of it costs the ranks much, and there are many."""
    number = next(NUMBERS)
    return {"structured_outputs": {"regex": f"([a-z ]*[aeiou][a-z ]{{{30 + number % 20}}}x)*"}, "max_tokens": 256}


def dear_compilation() -> dict[str, Any]:
    """An answer of one token to a schema that explodes."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": hostile_schema()}}
    return {"response_format": schema, "max_tokens": 1}


async def golden(session: aiohttp.ClientSession, url: str, model: str, until: float) -> list[float]:
    """Seconds between chunks of one stream after another."""
    gaps: list[float] = []
    while time.perf_counter() < until:
        body = {"model": model, "prompt": "A stage", "max_tokens": 256, "stream": True, "ignore_eos": True}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            before = None
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if before is not None:
                        gaps.append(now - before)
                    before = now
    return gaps


async def harm(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    until: float,
    fields: Callable[[], dict[str, Any]],
    told: Counter[str],
) -> None:
    """Requests that mean harm, one after another."""
    while time.perf_counter() < until:
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], **fields()}
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            await response.read()
            told[f"{fields.__name__} {response.status}"] += 1


def p99(gaps: list[float]) -> float:
    return statistics.quantiles(gaps, n=100)[98]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    plain: list[float] = []
    beside: list[float] = []
    told: Counter[str] = Counter()
    async with aiohttp.ClientSession() as session:
        await golden(session, options.url, options.model, time.perf_counter() + 2)  # warms up
        for number in range(options.rounds):
            until = time.perf_counter() + options.seconds
            streams = [golden(session, options.url, options.model, until) for _ in range(options.streams)]
            num_senders = options.senders if number % 2 else 0
            harmful = [
                asyncio.create_task(harm(session, options.url, options.model, until, fields, told))
                for _, fields in zip(range(num_senders), itertools.cycle([dear_compilation, dear_masks]))
            ]
            gaps = [gap for stream in await asyncio.gather(*streams) for gap in stream]
            await asyncio.gather(*harmful)
            (beside if number % 2 else plain).extend(gaps)
            kind = "with" if number % 2 else "without"
            print(f"{kind:8} p50 {statistics.median(gaps) * 1e3:6.2f} ms, p99 {p99(gaps) * 1e3:6.2f} ms", flush=True)
    figures = {"p99_ms": p99(plain) * 1e3, "p99_beside_ms": p99(beside) * 1e3}
    return {**figures, "ratio": figures["p99_beside_ms"] / figures["p99_ms"], "told": dict(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--senders", type=int, default=4)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
