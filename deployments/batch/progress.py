"""Tells people and programs how far a batch job is: one line on a terminal, elsewhere a line of JSON now and then."""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, TextIO

from deployments.batch.host import Figures
from deployments.batch.rows import Tally

Style = Literal["auto", "text", "json"]

_BAR_S, _LINE_S = 0.5, 10.0  # between two updates
_RECENT_S = 30.0  # the speed is that of the last seconds
_WIDTH = 20


class Progress:
    """Shows a Tally and what the gangs have counted. Used in the job's thread."""

    def __init__(
        self, tally: Tally, stream: TextIO, style: Style = "auto", clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`style` auto: text on a terminal, else JSON lines. `clock` gives seconds."""
        self._tally = tally
        self._stream = stream
        self._clock = clock
        self._is_json = style == "json" or (style == "auto" and not stream.isatty())
        self._shown_at = float("-inf")
        self._began = clock()
        self._past = Figures()  # of hosts that have ended
        self._now: Sequence[Figures] = ()
        self._recent: deque[tuple[float, int, int]] = deque()  # seconds, tokens and rows until then

    def bury(self, figures: Figures) -> None:
        """A host has ended: what it counted stays counted."""
        self._past = _sum([self._past, figures])

    def show(self, figures: Sequence[Figures], is_last: bool = False) -> None:
        """Say how far the job is, if it is time to; `figures` of the gangs that live, one each."""
        now, self._now = self._clock(), figures
        total = self._total()
        if not total.num_generated:
            self._recent.clear()  # the start of the gangs tells nothing of their speed
        self._recent.append((now, total.num_generated, self._num_done))
        while self._recent[0][0] < now - _RECENT_S and len(self._recent) > 2:
            self._recent.popleft()
        pause_s = _BAR_S if self._stream.isatty() and not self._is_json else _LINE_S
        if is_last or now - self._shown_at >= pause_s:
            self._shown_at = now
            self._write(is_last)

    def report(self) -> dict[str, object]:
        """All of it, for programs."""
        tally, total = self._tally, self._total()
        return {
            "rows": tally.total,
            "done": self._num_done,
            "failed": tally.failed,
            "skipped": tally.skipped,
            "seconds": round(self._clock() - self._began, 1),
            "seconds_left": None if self._seconds_left is None else round(self._seconds_left),
            "tokens_per_s": round(self._rate(1), 1),
            "generated_tokens": total.num_generated,
            "prompt_tokens": total.num_prompt,
            "cached_tokens": total.num_cached,
            "rebuilds": total.num_rebuilds,
            "preemptions": total.num_preemptions,
            "gangs": [
                {"state": one.state, "running": one.running, "waiting": one.waiting, "kv_usage": round(one.kv_usage, 3)}
                for one in self._now
            ],
        }

    def line(self) -> str:
        """One line for people."""
        tally, total = self._tally, self._total()
        share = (self._num_done / tally.total) if tally.total else 1.0
        filled = round(share * _WIDTH)
        parts = [f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {self._num_done} of {tally.total} rows"]
        if tally.failed:
            parts.append(f"{tally.failed} failed")
        parts.append(f"{self._rate(1):.0f} tokens/s")
        if total.num_cached:
            parts.append(f"{total.num_cached / total.num_prompt:.0%} of prompts cached")
        unusual = sorted({one.state for one in self._now} - {"ready"})
        parts += [f"gang {state}" for state in unusual]
        if self._seconds_left is not None:
            parts.append(f"{_duration(self._seconds_left)} left")
        return ", ".join(parts)

    @property
    def _num_done(self) -> int:
        return self._tally.skipped + self._tally.completed + self._tally.failed

    @property
    def _seconds_left(self) -> float | None:
        rate = self._rate(2)
        return (self._tally.total - self._num_done) / rate if rate else None

    def _total(self) -> Figures:
        return _sum([self._past, *self._now])

    def _rate(self, column: Literal[1, 2]) -> float:
        """Tokens (1) or rows (2) a second, lately."""
        if len(self._recent) < 2 or self._recent[-1][0] == self._recent[0][0]:
            return 0.0
        first, last = self._recent[0], self._recent[-1]
        return max(0.0, (last[column] - first[column]) / (last[0] - first[0]))

    def _write(self, is_last: bool) -> None:
        if self._is_json:
            self._stream.write(json.dumps(self.report()) + "\n")
        elif self._stream.isatty():
            self._stream.write("\r\x1b[K" + self.line() + ("\n" if is_last else ""))
        else:
            self._stream.write(self.line() + "\n")
        self._stream.flush()


def _sum(figures: Sequence[Figures]) -> Figures:
    """What has been counted by all; how they are now is that of none."""
    counts = [field.name for field in dataclasses.fields(Figures) if field.name.startswith("num_")]
    return Figures(**{name: sum(getattr(one, name) for one in figures) for name in counts})


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
