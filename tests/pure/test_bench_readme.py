"""README shows what `stagemesh bench` prints, of a run whose figures are kept, and only commands that there are."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deployments import cli
from deployments.bench import command as bench_command
from deployments.bench.text import OnlineReport, as_text

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = Path(__file__).parents[1] / "data" / "bench_example.json"  # what --json said
COMMAND = (
    "stagemesh bench --concurrency 1 4 16 --num-requests 64 --ignore-eos --goodput ttft_ms:500 tpot_ms:50 --seed 7"
)


def test_the_readme_shows_what_is_printed() -> None:
    report = msgspec.json.decode(EXAMPLE.read_bytes(), type=OnlineReport)
    shown = f"```\n$ {COMMAND}\n{as_text(report).rstrip()}\n```"
    assert shown in README, f"README.md shows other figures; these are:\n{shown}"


def test_every_command_of_the_readme_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[argparse.Namespace] = []

    def run(options: Any) -> int:
        bench_command._refuse_foreign(options)
        asked.append(options)
        return 0

    monkeypatch.setattr(bench_command, "run", run)
    lines = [line.removeprefix("$ ") for line in README.splitlines()]
    commands = [line for line in lines if line.startswith("stagemesh bench ")]
    for command in commands:
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, command
    assert {options.offline for options in asked} == {True, False} and len(asked) >= 5
