"""The documentation shows what `stagemesh bench` prints, of a run whose figures are kept."""

from pathlib import Path

import msgspec

from deployments.bench.text import OnlineReport, as_text

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/measuring.md"
EXAMPLE = Path(__file__).parents[1] / "data" / "bench_example.json"  # what --json said
COMMAND = (
    "stagemesh bench --concurrency 1 4 16 --num-requests 64 --ignore-eos --goodput ttft_ms:500 tpot_ms:50 --seed 7"
)


def test_the_page_shows_what_is_printed() -> None:
    report = msgspec.json.decode(EXAMPLE.read_bytes(), type=OnlineReport)
    shown = f"```\n$ {COMMAND}\n{as_text(report).rstrip()}\n```"
    assert shown in (ROOT / PAGE).read_text(encoding="utf-8"), f"{PAGE} shows other figures; these are:\n{shown}"
