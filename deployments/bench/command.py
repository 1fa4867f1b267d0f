"""`stagemesh bench`: how fast a server is, by its clients; or with --offline how fast a gang is, without HTTP.

    stagemesh bench [URL] [--concurrency N ... | --rate R ...] [--input-len T] [--output-len T] [--json] ...
    stagemesh bench CONFIG --offline [--layouts TPxPP ...] [--batch N ...] [--json] ...

Exit codes: 0 measured (failed requests are counted in the figures), 1 nothing could be measured, 2 a mistake on the
command line, 130 interrupted.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.decisions.model.accelerators import ACCELERATORS
from cluster.topology import Topology
from deployments.bench.figures import LIMITS
from deployments.plan.command import count

_DEFAULT_URL = "http://127.0.0.1:8000"
_LEN = 64  # tokens


def add_to(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "bench",
        help="measure a server under load, or with --offline gangs without HTTP",
        usage="stagemesh bench [URL] [options]\n       stagemesh bench CONFIG --offline [options]",
        description="Measure a running server under load, or with --offline gangs that are started for it.",
    )
    add = parser.add_argument
    add("target", nargs="?", help=f"URL of a server (default: {_DEFAULT_URL}); with --offline a config file")
    add("--offline", action="store_true", help="measure gangs started from a config file, without HTTP")
    add("--input-len", type=count, metavar="N", default=_LEN, help=f"tokens of a prompt; default: {_LEN}")
    add("--output-len", type=count, metavar="N", default=_LEN, help=f"tokens of an answer; default: {_LEN}")
    add("--seed", type=_count_or_zero, metavar="N", help="for prompts, arrivals and sampling; default: a new one")
    add("--json", action="store_true", help="print all figures as JSON")
    modes = {False: _add_online(parser), True: _add_offline(parser)}
    parser.set_defaults(run=run, refuse=parser.error, modes=modes)


def _add_online(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("measuring a server")
    load, add = group.add_mutually_exclusive_group(), group.add_argument
    load.add_argument(
        "--concurrency", type=count, metavar="N", nargs="+", help="clients; each waits for its answer; default: 1"
    )
    load.add_argument("--rate", type=_positive, metavar="R", nargs="+", help="requests a second, in a Poisson process")
    add("--num-requests", type=count, metavar="N", help="requests of each load; default: 4 a client, at least 16")
    add("--seconds", type=_positive, metavar="S", help="how long each load lasts; default with --rate: 30")
    add("--prefix-len", type=_count_or_zero, metavar="N", default=0, help="shared tokens before those of the input")
    add("--num-prefixes", type=count, metavar="N", default=1, help="number of different prefixes; default: 1")
    add("--conversations", metavar="FILE", help="JSONL file of chats, instead of random prompts")
    add("--chat", action="store_true", help="random words as chats, for servers without completions")
    add("--tokenizer", metavar="NAME", help="folder or hub id, for random ids; default: ask the server, else words")
    add("--model", metavar="ID", help="which of the server's models; default: the first")
    add("--ignore-eos", action="store_true", help="let answers go on to their full length")
    add("--temperature", type=_zero_or_more, metavar="X", default=0.0, help="default: 0, the likeliest token")
    add(
        "--goodput",
        type=_limit,
        metavar="NAME:MS",
        nargs="+",
        help=f"count requests within limits on {', '.join(LIMITS)}",
    )
    add("--warmup", type=count, metavar="N", default=1, help="requests before the first load; default: 1")
    add("--timeout", type=_positive, metavar="S", default=600.0, help="seconds for one answer; default: 600")
    add("--api-key-file", metavar="FILE", help="the API key; default: the variable OPENAI_API_KEY")
    add("--plot", metavar="FILE", help="draw latency against load, as .png or .svg")
    return group


def _add_offline(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("measuring gangs (--offline)")
    add = group.add_argument
    add("--layouts", type=_layout, metavar="TPxPP", nargs="+", help="shards x stages, in turn; default: the config's")
    add("--batch", type=count, metavar="N", nargs="+", default=[1, 8], help="sequences at once; default: 1 8")
    add("--rounds", type=count, metavar="N", default=3, help="rounds of each batch; the median counts; default: 3")
    add("--gpu", choices=list(ACCELERATORS), metavar="NAME", help=f"show its limits too: {', '.join(ACCELERATORS)}")
    return group


def run(options: argparse.Namespace) -> int:
    """Measure, and print the figures."""
    _refuse_foreign(options)
    options.seed = time.time_ns() % 2**31 if options.seed is None else options.seed
    try:
        return _offline(options) if options.offline else _online(options)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


def _refuse_foreign(options: argparse.Namespace) -> None:
    """Refuse options of the other kind of measurement, and options that contradict each other."""
    for action in options.modes[not options.offline]._group_actions:  # noqa: SLF001 - argparse has no public way
        if getattr(options, action.dest) != action.default:
            fitting = "a server that runs: leave --offline out" if options.offline else "gangs: give --offline"
            options.refuse(f"{action.option_strings[0]} is for {fitting}, or leave it out")
    if options.offline and not options.target:
        options.refuse("--offline needs a config file, for example configs/demo.yaml")
    if options.conversations and (options.chat or options.prefix_len or options.tokenizer):
        options.refuse("--conversations brings its prompts: leave out --chat, --prefix-len and --tokenizer")
    if options.chat and options.tokenizer:
        options.refuse("--chat sends words: leave out --tokenizer")


def _online(options: argparse.Namespace) -> int:
    from deployments.bench.online import loads, measure
    from deployments.bench.plot import check_plot, write_plot
    from deployments.bench.text import as_text

    options.target = options.target or _DEFAULT_URL
    options.goodput = dict(options.goodput or [])
    plot = Path(options.plot) if options.plot else None
    if plot:
        check_plot(plot, len(loads(options)))
    report = measure(options, _key(options.api_key_file))
    text = json.dumps(dataclasses.asdict(report), indent=2) + "\n" if options.json else as_text(report)
    sys.stdout.write(text)
    has_measured = any(one.completed for one in report.figures)
    if plot and has_measured:
        write_plot(report, plot)
        sys.stderr.write(f"the picture is in {plot}\n")
    return 0 if has_measured else 1


def _offline(options: argparse.Namespace) -> int:
    from deployments.bench.offline import as_text, measure

    report = measure(options)
    sys.stdout.write(json.dumps(dataclasses.asdict(report), indent=2) + "\n" if options.json else as_text(report))
    return 0


def _key(path: str | None) -> str | None:
    """The API key: from a file, so that no command line shows it, or from the environment."""
    if path is None:
        return os.environ.get("OPENAI_API_KEY") or None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file: {path} cannot be read ({error})") from None
    if not key or not key.isprintable():
        raise ValueError(f"--api-key-file: {path} holds no key; write the key alone into it")
    return key


def _layout(text: str) -> Topology:
    tp, _, pp = text.partition("x")
    if not (tp.isdecimal() and pp.isdecimal() and int(tp) and int(pp)):
        raise argparse.ArgumentTypeError(f"{text}: give shards x stages, for example 2x1")
    return Topology(int(tp), int(pp))


def _limit(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{text}: give NAME:MILLISECONDS with a name of {', '.join(LIMITS)}")
    return name, _positive(limit)


def _number(is_fine: Callable[[float], bool], wish: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not is_fine(value) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text or 'nothing'} is no number {wish}")
        return value

    return parse


_positive = _number(lambda value: value > 0, "above 0")
_zero_or_more = _number(lambda value: value >= 0, "of at least 0")


def _count_or_zero(text: str) -> int:
    return 0 if text == "0" else count(text)
