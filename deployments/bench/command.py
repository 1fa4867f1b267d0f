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
    parser = commands.add_parser("bench", help="how fast a server is under load, or with --offline a gang without HTTP")
    parser.add_argument("target", nargs="?", help=f"the URL of a server; default: {_DEFAULT_URL}; or a config file")
    parser.add_argument("--offline", action="store_true", help="start gangs from a config file, and no HTTP")
    parser.add_argument("--input-len", type=count, default=_LEN, help=f"tokens of a prompt; default: {_LEN}")
    parser.add_argument("--output-len", type=count, default=_LEN, help=f"tokens of an answer; default: {_LEN}")
    parser.add_argument(
        "--seed", type=_count_or_zero, help="of prompts, arrivals and sampling; default: another one each time"
    )
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    modes = {False: _add_online(parser), True: _add_offline(parser)}
    parser.set_defaults(run=run, refuse=parser.error, modes=modes)


def _add_online(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("of a server")
    load = group.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=count, nargs="+", help="clients that wait for their answers; default: 1")
    load.add_argument("--rate", type=_positive, nargs="+", help="requests a second that arrive by chance (Poisson)")
    group.add_argument("--num-requests", type=count, help="of each load; default: 4 a client, at least 16")
    group.add_argument("--seconds", type=_positive, help="of each load; default with --rate: 30")
    group.add_argument("--prefix-len", type=_count_or_zero, default=0, help="shared tokens before the input")
    group.add_argument("--num-prefixes", type=count, default=1, help="different shared prefixes; default: 1")
    group.add_argument("--conversations", metavar="FILE", help="JSONL of chat messages, instead of random prompts")
    group.add_argument("--chat", action="store_true", help="random words as chats, for servers without completions")
    group.add_argument("--tokenizer", help="folder or hub id; default: ask the server, else prompts are words")
    group.add_argument("--model", help="default: the server's first")
    group.add_argument("--ignore-eos", action="store_true", help="answers go on to their full length")
    group.add_argument("--temperature", type=_zero_or_more, default=0.0, help="default: 0, the likeliest token")
    group.add_argument("--goodput", type=_limit, nargs="+", help=f"limits, NAME:MS of {', '.join(LIMITS)}")
    group.add_argument("--warmup", type=count, default=1, help="requests before the first load; default: 1")
    group.add_argument("--timeout", type=_positive, default=600.0, help="seconds for one answer; default: 600")
    group.add_argument("--api-key-file", metavar="FILE", help="default: the variable OPENAI_API_KEY")
    group.add_argument("--plot", metavar="FILE", help="picture of latency against load, .png or .svg")
    return group


def _add_offline(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("of a gang (--offline)")
    group.add_argument("--layouts", type=_layout, nargs="+", help="TPxPP, in turn; default: the config's own")
    group.add_argument("--batch", type=count, nargs="+", default=[1, 8], help="sequences at once; default: 1 8")
    group.add_argument("--rounds", type=count, default=3, help="of each batch; the median counts; default: 3")
    group.add_argument("--gpu", choices=list(ACCELERATORS), help="adds what this device could reach at best")
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
    """An option of the other kind of measurement would mean nothing."""
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
