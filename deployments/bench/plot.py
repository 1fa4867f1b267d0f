"""The picture of a load test: TTFT and TPOT against load, and against the throughput reached. PNG or SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.bench.figures import Figures, Spread
from deployments.bench.text import OnlineReport

SUFFIXES = (".png", ".svg")
_P50, _P99 = "#1f5fa8", "#d1642e"


def check_plot(path: Path, num_loads: int) -> None:
    """Raises ValueError when no picture could be written there. To be called before the load starts."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot: {path} must end in .png or .svg")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: the folder of {path} does not exist; make it first")
    if num_loads < 2:
        raise ValueError("--plot: one load is one point; give several, for example --concurrency 1 2 4 8")
    try:
        import matplotlib.figure  # noqa: F401 - an extra: only a picture needs it
    except ImportError:
        raise ValueError(
            "--plot: needs matplotlib; pip install '.[bench]' in the checkout, or just matplotlib"
        ) from None


def write_plot(report: OnlineReport, path: Path) -> None:
    """Two rows, TTFT and TPOT; two columns, against load and against output tokens/s. Raises OSError."""
    from matplotlib.figure import Figure

    found = [one for one in report.figures if one.ttft_ms and one.tpot_ms]
    is_closed = all(one.concurrency for one in found)
    loads = [float(one.concurrency or one.rate or 0) for one in found]
    rates = [one.output_tokens_per_s for one in found]
    picture = Figure(figsize=(9, 6.2), layout="constrained")
    grid: Any = picture.subplots(2, 2, sharey="row")
    for row, (name, field) in enumerate((("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"))):
        spreads: list[Spread] = [getattr(one, field) for one in found]
        for axes, across in zip(grid[row], (loads, rates), strict=True):
            _lines(axes, across, spreads)
        grid[row][0].set_ylabel(f"{name} (ms)")
        _name_points(grid[row][1], rates, spreads, found)
    _ticks(grid[0][0], grid[1][0], loads)
    grid[1][0].set_xlabel("concurrent requests" if is_closed else "requests/s asked")
    grid[1][1].set_xlabel("output tokens/s")
    grid[0][0].legend(frameon=False)
    picture.suptitle(f"{report.model}: {report.prompts}; {report.output_len} tokens out", fontsize=11)
    picture.savefig(path, dpi=150)


def _lines(axes: Any, across: Sequence[float], spreads: Sequence[Spread]) -> None:
    axes.plot(across, [one.p50 for one in spreads], "o-", color=_P50, label="p50")
    axes.plot(across, [one.p99 for one in spreads], "s--", color=_P99, label="p99")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _name_points(axes: Any, across: Sequence[float], spreads: Sequence[Spread], found: Sequence[Figures]) -> None:
    for x, spread, one in zip(across, spreads, found, strict=True):
        axes.annotate(str(one.load), (x, spread.p50), xytext=(4, -10), textcoords="offset points", fontsize=8)
    axes.margins(x=0.1)


def _ticks(top: Any, bottom: Any, loads: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each load, as loads are mostly powers of two."""
    for axes in (top, bottom):
        axes.set_xscale("log")
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.set_xticks([], minor=True)
