"""Draws the board of docs/operations.md from a run that it records: the demo under load, and a rank that is killed.

    python benchmarks/board_picture.py docs/board.png --minutes 4

Prometheus (`apt-get install prometheus`) scrapes the demo and answers the queries of k8s/monitoring/dashboard.json; the
panels are drawn here, in their places, and not by Grafana.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter  # noqa: E402
from PIL import Image  # noqa: E402

from tests.prometheus import MONITORING, Prometheus, filled  # noqa: E402
from tests.serving import Run, until  # noqa: E402

KEYS = {"alice": "sk-alice-alice-alice-alice", "bob": "sk-bob-bob-bob-bob-bob-bob"}
CLIENTS = (2, 6, 12, 20, 6)  # at once, one part of the run after the other; the demo computes eight of full length
COLORS = ("#1f5fa8", "#d1642e", "#3c8d40", "#8a4fa3", "#b8860b", "#c23b5a", "#2a9d9d", "#7a7a7a")
STEP_S = 2.0
UNIT_INCHES = (0.62, 0.30)  # of one column and one line of the board's grid


class Load:
    """Clients that ask one request after the other, each with a key, until they are told to stop."""

    def __init__(self, url: str) -> None:
        self.num_wanted = 0
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(max(CLIENTS))]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when the last one has its answer."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        dice, name = random.Random(number), "alice" if number % 3 else "bob"
        while not self._is_over.is_set():
            if number >= self.num_wanted:
                self._is_over.wait(0.2)
                continue
            prompt = "What is a stage? " * dice.choice((1, 4, 12)) + f"Number {dice.randrange(20)}."
            body = {"model": "stagemesh-demo", "prompt": prompt, "max_tokens": dice.choice((8, 24, 64, 120))}
            headers = {"authorization": f"Bearer {KEYS[name]}"}
            body |= {"stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, headers=headers, timeout=120) as answer:
                answer.read()


def recorded(run: Run, prometheus: Prometheus, seconds: float) -> tuple[float, float]:
    """Serve under changing load, with a rank killed past the half → when it began and ended, seconds since 1970."""
    began, load = time.time(), Load(run.url)
    for part, wanted in enumerate(CLIENTS):
        load.num_wanted = wanted
        time.sleep(seconds / len(CLIENTS) / 2)
        if part == len(CLIENTS) - 2:
            ranks = [process for process in run.processes() if "RankActor" in " ".join(process.cmdline())]
            os.kill(min(ranks, key=lambda process: process.create_time()).pid, signal.SIGKILL)
        time.sleep(seconds / len(CLIENTS) / 2)
    load.stop()
    until(lambda: prometheus.query("sum(stagemesh_requests_running) == 0"), within_s=30)
    return began, time.time()


def drawn(prometheus: Prometheus, began: float, ended: float) -> Figure:
    """All panels in their places."""
    board = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board)
    picture = Figure(figsize=(24 * UNIT_INCHES[0], lines * UNIT_INCHES[1]), facecolor="#f4f5f5")
    for panel in board:
        place = panel["gridPos"]
        if panel["type"] == "row":
            picture.text(0.004, 1 - (place["y"] + 0.7) / lines, panel["title"], fontsize=11, weight="bold")
            continue
        left, bottom = place["x"] / 24 + 0.034, 1 - (place["y"] + place["h"] - 1.0) / lines
        axes = picture.add_axes((left, bottom, place["w"] / 24 - 0.045, (place["h"] - 2.2) / lines), facecolor="white")
        axes.set_title(panel["title"], fontsize=9, loc="left")
        _dress(axes, panel["fieldConfig"]["defaults"]["unit"], panel["type"])
        if panel["type"] == "bargauge":
            _bars(axes, panel, prometheus, ended, ended - began)
        else:
            _curves(axes, panel, prometheus, (began, ended))
    return picture


def _dress(axes: Any, unit: str, kind: str) -> None:
    axes.tick_params(labelsize=7, length=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axis = axes.xaxis if kind == "bargauge" else axes.yaxis
    formatters: dict[str, Any] = {"percentunit": PercentFormatter(1, decimals=0), "s": EngFormatter("s", sep=" ")}
    axis.set_major_formatter(formatters.get(unit, "{x:g}"))
    axis.set_major_locator(MaxNLocator(4))


def _bars(axes: Any, panel: dict[str, Any], prometheus: Prometheus, ended: float, seconds: float) -> None:
    (target,) = panel["targets"]
    found = prometheus.query_range(filled(target["expr"], "10s", f"{seconds:.0f}s"), ended, ended, 1)
    named = {_legend(target, series): float(series["values"][-1][1]) for series in found}
    axes.barh(list(named), list(named.values()), color=COLORS[0])


def _curves(axes: Any, panel: dict[str, Any], prometheus: Prometheus, time_shown: tuple[float, float]) -> None:
    began, ended = time_shown
    is_stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    times = [began + STEP_S * step for step in range(int((ended - began) / STEP_S) + 1)]
    curves = {}
    for target in panel["targets"]:
        for series in prometheus.query_range(filled(target["expr"], "10s"), began, times[-1] + 0.5, STEP_S):
            at = {round((float(when) - began) / STEP_S): float(value) for when, value in series["values"]}
            curve = [at.get(step, float("nan")) for step in range(len(times))]
            if not is_stacked or any(value > 0 for value in curve):
                curves[_legend(target, series)] = curve
    minutes = [(when - began) / 60 for when in times]
    if is_stacked and curves:
        filled_up = [[value if value == value else 0.0 for value in curve] for curve in curves.values()]
        axes.stackplot(minutes, filled_up, labels=list(curves), colors=COLORS, alpha=0.7)
    for number, (name, curve) in enumerate(() if is_stacked else curves.items()):
        axes.plot(minutes, curve, color=COLORS[number % len(COLORS)], linewidth=1.1, label=name)
    axes.set_xlim(0, minutes[-1])
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)  # room for the legend
    axes.xaxis.set_major_formatter("{x:g} min")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if curves:
        axes.legend(fontsize=6, frameon=False, ncols=2, loc="upper left")


def _legend(target: dict[str, Any], series: dict[str, Any]) -> str:
    """The words beside a curve, with the series' labels filled in."""
    legend: str = target["legendFormat"]
    for label, value in series["metric"].items():
        legend = legend.replace("{{" + label + "}}", value[:8] if label == "node" else value)
    return legend


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="a .png")
    parser.add_argument("--minutes", type=float, default=4.0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "keys.yaml").write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    changes: dict[str, Any] = {
        "api": {"keys": f"file:{folder / 'keys.yaml'}"},
        "recovery": {"warm_spares": 1},
        "cache": {"num_blocks": 96},
    }
    with Run(folder, **changes) as run:
        run.wait_for()
        with Prometheus(folder, {"stagemesh": [f"{run.url}/metrics"]}) as prometheus:
            began, ended = recorded(run, prometheus, options.minutes * 60)
            picture = drawn(prometheus, began, ended)
    picture.savefig(options.picture, dpi=80)
    Image.open(options.picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(
        options.picture, optimize=True
    )
    print(f"{options.picture}: {options.picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
