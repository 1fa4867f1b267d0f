"""`stagemesh profile`: where the time between two tokens goes, on each rank of a running server.

    stagemesh profile [URL] [--seconds S] [--json]

Reads `/cluster` twice and shows what each rank did in between. Put load on the server meanwhile: without it all ranks
are idle. Exit codes: 0 shown, 1 the server does not answer or was rebuilt meanwhile, 2 a mistake on the command line.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any

from actors.decisions.failure.patience import HEARTBEAT_S  # the times in /cluster are up to this old
from actors.decisions.schedule.phase_clock import BUBBLE, PHASES, bubble_ratio

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RankProfile:
    """How one rank spent its time while it was watched."""

    rank: int
    stage: int
    shard: int
    shares: dict[str, float]  # by phase; their sum is 1
    bubble_ratio: float


def add_to(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "profile",
        help="show where the time between two tokens goes, on a running server",
        description="Show what each rank of a running server does. Put load on it meanwhile: else all ranks are idle.",
    )
    parser.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8000", help="URL of a server; default: http://127.0.0.1:8000"
    )
    parser.add_argument("--seconds", type=_seconds, metavar="S", default=10.0, help="how long to watch; default: 10")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the profile."""
    try:
        before = cluster(options.url)
        if sys.stderr.isatty():
            sys.stderr.write(f"watching {before['model']} for {options.seconds:g} s ...\n")
        time.sleep(options.seconds)
        found = profiles(before, cluster(options.url))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps([asdict(one) for one in found], indent=2) + "\n" if options.json else _text(found))
    return 0


def cluster(url: str) -> dict[str, Any]:
    """The answer to `GET /cluster`. Raises ValueError when no stagemesh server answers."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/cluster", timeout=_TIMEOUT_S) as reply:  # noqa: S310 - asked for
            answer: dict[str, Any] = json.load(reply)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ValueError(
            f"{url}: no stagemesh server answers there ({reason}); give the URL of one that runs"
        ) from None
    if not isinstance(answer, dict) or "ranks" not in answer:
        raise ValueError(f"{url}: another kind of server answers there; give the URL of a stagemesh server")
    return answer


def profiles(before: dict[str, Any], after: dict[str, Any]) -> list[RankProfile]:
    """How each rank spent the time between two answers of `/cluster`. Raises ValueError when their epochs differ."""
    if (before["replica"], before["epoch"]) != (after["replica"], after["epoch"]):
        raise ValueError("another replica or epoch answered the second time; try again, or ask one replica directly")
    found = []
    for first, last in zip(before["ranks"], after["ranks"], strict=True):
        spent = {phase: last["seconds"].get(phase, 0.0) - first["seconds"].get(phase, 0.0) for phase in PHASES}
        total = sum(spent.values())
        if total <= 0:
            raise ValueError(
                f"rank {first['rank']} has told nothing new; watch for longer than its heartbeat of {HEARTBEAT_S:g} s"
            )
        shares = {phase: seconds / total for phase, seconds in spent.items()}
        found.append(RankProfile(first["rank"], first["stage"], first["shard"], shares, bubble_ratio(spent)))
    return found


def _text(found: list[RankProfile]) -> str:
    rows = [f"rank  stage  shard  {'  '.join(f'{phase:>8}' for phase in PHASES)}    bubble"]
    for one in found:
        shares = "  ".join(f"{one.shares[phase]:8.1%}" for phase in PHASES)
        rows.append(f"{one.rank:4}  {one.stage:5}  {one.shard:5}  {shares}  {one.bubble_ratio:8.1%}")
    legend = [f"  {phase:<9} {words}" for phase, words in PHASES.items()]
    legend.append(f"  bubble    {' + '.join(BUBBLE)}: the stage has nothing to compute")
    return "\n".join([*rows, "", *legend]) + "\n"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 2 * HEARTBEAT_S <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: give from {2 * HEARTBEAT_S:g} to 3600 seconds")
    return seconds
