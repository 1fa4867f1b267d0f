"""What a user of our server feels beside plain throughput: cached prefixes, long prompts among streams, bubbles.

    python benchmarks/scenarios.py CHECKPOINT [--only prefix interference bubble] [--rounds 5]

    prefix        TTFT of a long prompt whose prefix is cached, against one whose is not
    interference  p99 ITL of 8 running streams while long prompts arrive, against without; TTFT of those against alone
    bubble        share of time in which each stage of two has nothing to compute, 32 streams

Starts our server on CPU or CUDA (TP 2, then PP 2). Prints ratios; the last line is JSON.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from servers import ROOT, add_layout, ours, running

sys.path.insert(0, str(ROOT))
from deployments.bench.client import Client
from deployments.bench.figures import Timeline, spread
from deployments.bench.load import COMPLETIONS, Ask
from deployments.bench.profile import cluster, profiles

LONG, TAIL = 1500, 60  # tokens of a long prompt, and those of it that are never cached
STREAMS, BUBBLE_STREAMS = 8, 32
STREAM_TOKENS = 240
SETTLE_S, PAUSE_S = 1.5, 0.7
WATCH_S = 10.0


class Asker:
    """Sends prompts of random ids, each of its own."""

    def __init__(self, client: Client, vocabulary: int) -> None:
        self._client, self._vocabulary = client, vocabulary
        self._rng = random.Random()

    def ids(self, count: int) -> list[int]:
        return self._rng.choices(range(5, self._vocabulary), k=count)

    async def __call__(self, prompt: list[int], output_len: int) -> Timeline:
        fields = {"model": "compared", "prompt": prompt, "max_tokens": output_len, "ignore_eos": True}
        timeline = await self._client.send(Ask(COMPLETIONS, fields, len(prompt)))
        if timeline.error:
            raise SystemExit(timeline.error)
        return timeline


async def prefix(ask: Asker, options: argparse.Namespace) -> dict[str, float]:
    cold, cached = [], []
    for _ in range(options.rounds):
        shared = ask.ids(LONG - TAIL)
        cold.append((await ask(shared + ask.ids(TAIL), 2)).ttft_s)
        cached.append((await ask(shared + ask.ids(TAIL), 2)).ttft_s)
    return ratio("cached_ttft_ms", statistics.median(cached), "cold_ttft_ms", statistics.median(cold))


async def interference(ask: Asker, options: argparse.Namespace) -> dict[str, float]:
    alone, among, calm, disturbed = [], [], [], []
    for _ in range(options.rounds):
        alone.append((await ask(ask.ids(LONG), 2)).ttft_s)
        streams = await asyncio.gather(*(ask(ask.ids(64), STREAM_TOKENS) for _ in range(STREAMS)))
        calm += gaps_s(streams, max(one.chunks_s[0] for one in streams), min(one.chunks_s[-1] for one in streams))
        running_streams = [asyncio.ensure_future(ask(ask.ids(64), STREAM_TOKENS)) for _ in range(STREAMS)]
        await asyncio.sleep(SETTLE_S)
        arrivals = []
        while not any(one.done() for one in running_streams):
            arrivals.append(await ask(ask.ids(LONG), 2))
            await asyncio.sleep(PAUSE_S)
        streams = await asyncio.gather(*running_streams)
        ended = min(one.chunks_s[-1] for one in streams)
        disturbed += gaps_s(streams, arrivals[0].sent_s, ended)
        among += [one.ttft_s for one in arrivals if one.chunks_s[0] < ended]
    quiet, loud = spread(calm), spread(disturbed)
    assert quiet and loud
    found = ratio("disturbed_p99_itl_ms", loud.p99 / 1e3, "calm_p99_itl_ms", quiet.p99 / 1e3, "itl_ratio")
    return found | ratio(
        "among_ttft_ms", statistics.median(among), "alone_ttft_ms", statistics.median(alone), "ttft_ratio"
    )


def gaps_s(streams: list[Timeline], began_s: float, ended_s: float) -> list[float]:
    """Between tokens that came in a span of time."""
    pairs = itertools.chain.from_iterable(itertools.pairwise(one.chunks_s) for one in streams)
    return [after - before for before, after in pairs if before >= began_s and after <= ended_s]


async def bubble(ask: Asker, options: argparse.Namespace) -> dict[str, float]:
    async def client() -> None:
        while True:
            await ask(ask.ids(options.input_len), options.output_len)

    clients = [asyncio.ensure_future(client()) for _ in range(BUBBLE_STREAMS)]
    url = f"http://127.0.0.1:{options.port}"
    try:
        await asyncio.sleep(WATCH_S / 2)
        before = await asyncio.to_thread(cluster, url)
        await asyncio.sleep(WATCH_S)
        after = await asyncio.to_thread(cluster, url)
    finally:
        for one in clients:
            one.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    found = {f"stage {one.stage}": round(one.bubble_ratio, 3) for one in profiles(before, after)}
    print("  ".join(f"{stage}: {share:.1%}" for stage, share in found.items()), flush=True)
    return found


def ratio(name: str, value_s: float, against: str, other_s: float, called: str = "ratio") -> dict[str, float]:
    found = {name: round(value_s * 1e3, 1), against: round(other_s * 1e3, 1), called: round(value_s / other_s, 3)}
    print("  ".join(f"{key}: {value}" for key, value in found.items()), flush=True)
    return found


Scenario = Callable[[Asker, argparse.Namespace], Awaitable[dict[str, float]]]
SCENARIOS: dict[str, tuple[Scenario, int, int]] = {  # with shards and stages
    "prefix": (prefix, 2, 1),
    "interference": (interference, 2, 1),
    "bubble": (bubble, 1, 2),
}


async def observe(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    vocabulary = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]
    shared = {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    found = {}
    async with Client(f"http://127.0.0.1:{options.port}", None, 600.0, shared) as client:
        ask = Asker(client, vocabulary)
        await asyncio.gather(*(ask(ask.ids(LONG), 16) for _ in range(2)))  # warm-up
        for name in names:
            print(f"{name}: ", end="", flush=True)
            found[name] = await SCENARIOS[name][0](ask, options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layout(parser)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for layout in ((2, 1), (1, 2)):
        names = [name for name in options.only if SCENARIOS[name][1:] == layout]
        if names:
            with tempfile.TemporaryDirectory() as folder, running(ours(options, Path(folder), *layout)):
                found |= asyncio.run(observe(options, names))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
