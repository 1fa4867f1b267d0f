"""What the fault tests share: a served gang of 2 x 2 ranks, progress while they run, a figure's table at their end."""

import faulthandler
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.chaos.serving import App, arguments, cluster, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where spells that act once are remembered."""
    return tmp_path_factory.mktemp("spells")


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[App]:
    """Its ranks obey spells."""
    with cluster(), served(arguments((2, 2)), folder) as app:
        yield app


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line past pytest's capture, with the seconds since the test began."""
    began = time.monotonic()

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True)

    return say


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[str, list[dict[str, Any]]], None]:
    """Prints rows as a table, and the same as one line of JSON. Whoever asks for it takes long, and that is no hang."""
    faulthandler.cancel_dump_traceback_later()

    def table(title: str, rows: list[dict[str, Any]]) -> None:
        cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        with capsys.disabled():
            print(f"\n{title}")
            for line in cells:
                print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
            print(json.dumps({"figure": title, "rows": rows}), flush=True)

    return table


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
