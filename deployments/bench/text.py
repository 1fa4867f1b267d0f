"""`stagemesh bench` of a server, for people: the figures of every load as aligned text of at most 100 columns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.bench.figures import Figures, Spread

_LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("end to end", "e2e_ms"))
_MOST_REASONS = 5
_BUSY = 0.7  # of a core


@dataclass(frozen=True)
class OnlineReport:
    """A whole load test."""

    url: str
    model: str
    prompts: str
    output_len: int
    ignore_eos: bool
    temperature: float
    seed: int
    limits: dict[str, float]  # of goodput, in milliseconds
    figures: tuple[Figures, ...]  # by load, in the order asked for


def as_text(report: OnlineReport) -> str:
    """The whole text, section by section."""
    sections = [_head(report), _throughput(report), _latency(report.figures), _failures(report.figures)]
    sections.append([f"  - {note}" for note in notes(report)])
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _head(report: OnlineReport) -> list[str]:
    ends = "end of sequence ignored" if report.ignore_eos else "may end earlier"
    return [
        f"{report.model} at {report.url}",
        (
            f"prompts of {report.prompts}; {report.output_len} tokens out, {ends}; "
            f"temperature {report.temperature:g}; seed {report.seed}"
        ),
    ]


def _throughput(report: OnlineReport) -> list[str]:
    rows = [("  load", "done", "failed", "seconds", "in flight", "requests/s", "output tok/s", "total tok/s")]
    rows += [
        (
            f"  {one.load}",
            str(one.completed),
            str(one.failed),
            f"{one.duration_s:.1f}",
            f"{one.mean_concurrency:.1f}",
            f"{one.requests_per_s:.2f}",
            f"{one.output_tokens_per_s:.1f}",
            "-" if one.total_tokens_per_s is None else f"{one.total_tokens_per_s:.1f}",
        )
        for one in report.figures
    ]
    if not report.limits:
        return ["Throughput", *aligned(rows)]
    goodput = ["goodput/s", *(f"{one.goodput_per_s:.2f}" for one in report.figures)]
    kept = ", ".join(f"{name} {limit:g}" for name, limit in report.limits.items())
    table = [(*row, cell) for row, cell in zip(rows, goodput, strict=True)]
    return [f"Throughput; goodput: requests that keep {kept}", *aligned(table)]


def _latency(found: Sequence[Figures]) -> list[str]:
    rows = [("  load", *("p50", "p90", "p99") * len(_LATENCIES))]
    for one in found:
        spreads: list[Spread | None] = [getattr(one, field) for _, field in _LATENCIES]
        cells = [cell for spread in spreads for cell in _cells(spread)]
        rows.append((f"  {one.load}", *cells))
    table = aligned(rows)
    ends = [index + 3 for index in range(len(table[0])) if table[0].startswith("p99", index)]
    head = "  ms"
    for (name, _), end in zip(_LATENCIES, ends, strict=True):
        head = head.ljust(end - len(name)) + name
    return ["Latency", head, *table]


def _cells(spread: Spread | None) -> list[str]:
    return ["-"] * 3 if spread is None else [_ms(value) for value in (spread.p50, spread.p90, spread.p99)]


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _failures(found: Sequence[Figures]) -> list[str]:
    lines = []
    for one in found:
        shown = list(one.failures.items())[:_MOST_REASONS]
        lines += [f"  {one.load}: {count} x {reason}" for reason, count in shown]
        if len(one.failures) > len(shown):
            lines.append(f"  {one.load}: and {len(one.failures) - len(shown)} more reasons (--json has all)")
    return ["Failed", *lines] if lines else []


def notes(report: OnlineReport) -> list[str]:
    """Notes without which the figures could be misread."""
    said = []
    done = [one for one in report.figures if one.completed]
    if any(one.prompt_tokens is None for one in done):
        said.append("the server sends no usage: prompts are not counted, and each chunk counts as one token")
    if any(one.tokens_per_chunk > 1.05 for one in done):
        most = max(one.tokens_per_chunk for one in done)
        said.append(f"up to {most:.1f} tokens come in one chunk: ITL is the gap between chunks, TPOT is by tokens")
    if any(one.client_cpu_share > _BUSY for one in done):
        most = max(one.client_cpu_share for one in done)
        said.append(f"the load client itself took {most:.0%} of a core: it may be what limits these figures")
    return said


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column left-justified, the others right-justified, each as wide as its widest cell."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in table
    ]
