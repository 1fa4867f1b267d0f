"""A load test of a running server, from the command line's options to a report."""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from deployments.api.sampling_defaults import FIELDS, SamplingDefaults
from deployments.bench.client import Client, connection_words, error_words
from deployments.bench.drive import Extent, Progress, drive
from deployments.bench.figures import Figures, Load, Timeline, figures
from deployments.bench.load import CHAT, Ask, RandomPrompts, Workload, read_conversations
from deployments.bench.progress import shown
from deployments.bench.text import OnlineReport

_OPEN_SECONDS = 30.0  # of arrivals, by default
_FEWEST, _PER_CLIENT = 16, 4  # requests of a closed loop, by default


def measure(options: argparse.Namespace, key: str | None) -> OnlineReport:
    """Put load on the server as the options say. Raises ValueError, with the remedy, when that is impossible."""
    return uvloop.run(_measure(options, key))


async def _measure(options: argparse.Namespace, key: str | None) -> OnlineReport:
    url = base_url(options.target)
    shared = {"stream": True, "stream_options": {"include_usage": True}}
    async with Client(url, key, options.timeout, shared) as client:
        with _connection_said(url):
            model = await _model(client, options.model)
            workload = await _workload(client, options, model["id"])
        _check_lengths(options, workload, model.get("max_model_len"))
        send = Sender(client, workload, options, model)
        await _warm_up(send, url, options.warmup)
        found = []
        for level, load in enumerate(loads(options)):
            found.append(await _level(send, level, load, options))
    return OnlineReport(
        url=url,
        model=model["id"],
        prompts=str(workload),
        output_len=options.output_len,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        seed=options.seed,
        limits=options.goodput or {},
        figures=tuple(found),
    )


class Sender:
    """Sends requests with the fields that the options ask for."""

    def __init__(
        self, client: Client, workload: Workload, options: argparse.Namespace, model: Mapping[str, Any]
    ) -> None:
        """`model`: its card. Sampling fields for which it names a default are sent as what changes nothing.

        The figures are then those of the load asked for, whatever the checkpoint's own settings.
        """
        self._client, self._workload, self._options = client, workload, options
        plain, named = SamplingDefaults().in_force(), model.get("sampling_defaults") or {}
        self._fields = {"model": model["id"], **{name: plain[name] for name in FIELDS if name in named}}
        self._fields["temperature"] = options.temperature

    async def __call__(self, level: int, index: int) -> Timeline:
        """Send request `index` of a load, which is the `level`th of the sweep."""
        options, ask = self._options, self._workload.ask(level, index)
        limit = "max_completion_tokens" if ask.path == CHAT else "max_tokens"
        fields: dict[str, Any] = {**self._fields, limit: options.output_len, **ask.fields}
        if options.ignore_eos:
            fields["ignore_eos"] = True
        if options.temperature > 0:
            fields["seed"] = options.seed + index
        return await self._client.send(Ask(ask.path, fields, ask.prompt_tokens))


def base_url(url: str) -> str:
    """The URL without `/v1` and slashes at its end. Raises ValueError for anything else."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is no URL; give one such as http://127.0.0.1:8000, or --offline with a config file")
    return url.rstrip("/").removesuffix("/v1")


def loads(options: argparse.Namespace) -> list[Load]:
    """All loads, in the order asked for."""
    if options.rate:
        return [Load(rate=rate) for rate in options.rate]
    return [Load(concurrency=concurrency) for concurrency in options.concurrency or [1]]


def extent(options: argparse.Namespace, load: Load) -> Extent:
    """When to stop sending: as asked for, or by default."""
    if options.num_requests or options.seconds:
        return Extent(options.num_requests, options.seconds)
    if load.concurrency:
        return Extent(num_requests=max(_FEWEST, _PER_CLIENT * load.concurrency))
    return Extent(seconds=_OPEN_SECONDS)


@contextlib.contextmanager
def _connection_said(url: str) -> Iterator[None]:
    """Turns a connection error into a ValueError with the remedy."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        words = connection_words(error)
        raise ValueError(f"{url}: no server answers there ({words}); give the URL of one that runs") from None


async def _model(client: Client, wanted: str | None) -> dict[str, Any]:
    """The card of the model to load: the one named, or the first that the server has."""
    status, answer = await client.look("/v1/models")
    if status in (401, 403):
        raise ValueError(f"{client.url} wants an API key: set OPENAI_API_KEY, or give --api-key-file FILE")
    cards = answer.get("data") if status == 200 and isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        said = f"HTTP {status}: {error_words(answer)}" if status != 200 else "no list of models"
        raise ValueError(
            f"{client.url}/v1/models answers {said}; give the URL of an OpenAI-compatible server, without /v1"
        )
    named = [card for card in cards if wanted in (None, card["id"])]
    if not named:
        there = ", ".join(card["id"] for card in cards) or "none"
        raise ValueError(f"--model: {client.url} does not serve {wanted}; it has {there}")
    card: dict[str, Any] = named[0]
    return card


async def _workload(client: Client, options: argparse.Namespace, model: str) -> Workload:
    if options.conversations:
        return read_conversations(Path(options.conversations))
    ids = None
    if options.tokenizer:
        ids = await asyncio.to_thread(_ids_of, options.tokenizer)
    elif not options.chat:
        ids = await client.known_ids(model)
    return RandomPrompts(
        options.seed, options.input_len, options.prefix_len, options.num_prefixes, ids, is_chat=options.chat
    )


def _ids_of(source: str) -> list[int]:
    """Every id of a tokenizer, except its special tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer: {source}: {error}") from None
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def _check_lengths(options: argparse.Namespace, workload: Workload, most: int | None) -> None:
    """Refuse lengths that the server would refuse in every request."""
    if not isinstance(workload, RandomPrompts) or workload.ids is None or most is None:
        return
    asked = options.prefix_len + options.input_len + options.output_len
    if asked > most:
        raise ValueError(
            f"--prefix-len, --input-len and --output-len: {asked} tokens together, but the server takes {most} "
            "(max_model_len); ask for fewer"
        )


async def _warm_up(send: Sender, url: str, count: int) -> None:
    """Send one request first, alone: its error would be the error of all. Raises ValueError."""
    first = await send(-1, 0)
    if first.error:
        raise ValueError(f"{url}: the first request failed: {first.error}{remedy(first.error)}")
    await asyncio.gather(*(send(-1, index) for index in range(1, count)))


def remedy(error: str) -> str:
    """What to do about a request that the server refuses."""
    remedies = {
        "HTTP 401": "; set OPENAI_API_KEY, or give --api-key-file FILE",
        "HTTP 403": "; set OPENAI_API_KEY, or give --api-key-file FILE",
        "HTTP 404": "; where the server only has chats, give --chat",
        "HTTP 400": "; change the option that the server names (--ignore-eos is not OpenAI's own)",
        "HTTP 503": "; wait until the server is ready",
    }
    return remedies.get(error[:8], "; the server's log may say more")


async def _level(send: Sender, level: int, load: Load, options: argparse.Namespace) -> Figures:
    progress = Progress(load, extent(options, load))
    async with shown(progress, sys.stderr):
        cpu_s = await drive(lambda index: send(level, index), progress, options.seed)
    if not progress.timelines:
        raise ValueError(f"{load}: no request was due within {progress.extent.seconds:g} s; give more --seconds")
    return figures(load, progress.timelines, cpu_s, options.goodput)
