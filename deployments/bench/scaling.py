"""The offline benchmark's figures: layouts side by side, with speed-up and efficiency against the first."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments.bench.text import aligned
from deployments.plan.text import size


@dataclass(frozen=True)
class Round:
    """One batch through a gang once: when each sequence's tokens came, in seconds from its submission."""

    tokens_s: tuple[tuple[float, ...], ...]  # by sequence

    def prefill_tokens_per_s(self, input_len: int) -> float:
        """Prompt tokens of the batch / the time until its last sequence has a first token."""
        return len(self.tokens_s) * input_len / max(one[0] for one in self.tokens_s)

    def decode_tokens_per_s(self) -> float:
        """Tokens a second while the whole batch decodes: from the last first token to the first last one.

        Raises ValueError when there is no such time.
        """
        began, ended = max(one[0] for one in self.tokens_s), min(one[-1] for one in self.tokens_s)
        count = sum(began < token_s <= ended for one in self.tokens_s for token_s in one)
        if not count:
            raise ValueError(
                "--output-len: the first sequence ends before the last one has its first token, so that the batch "
                "never decodes together; ask for more tokens, or a smaller --batch"
            )
        return count / (ended - began)


@dataclass(frozen=True)
class BatchSpeed:
    """The speed of one batch size on one layout; medians of the rounds."""

    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    best_prefill_tokens_per_s: float | None  # as `stagemesh plan` estimates it; None: the device is not known
    best_decode_tokens_per_s: float | None

    @property
    def ms_per_token(self) -> float:
        """Milliseconds from one token of a sequence to its next."""
        return 1e3 * self.batch / self.decode_tokens_per_s


@dataclass(frozen=True)
class LayoutFigures:
    """Everything measured on one layout; tuples of bytes are by rank."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    start_s: float  # from the gang asked for to the gang ready: processes, imports, weights, warm-up
    load_s: float  # of that, reading weights: the slowest rank
    num_blocks: int
    weight_bytes: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    process_bytes: tuple[int | None, ...]  # private memory of the process; None: on another node
    speeds: tuple[BatchSpeed, ...]

    @property
    def num_ranks(self) -> int:
        """Ranks of the gang."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def __str__(self) -> str:
        return f"{self.tensor_parallel_size} x {self.pipeline_parallel_size}"


@dataclass(frozen=True)
class Scaling:
    """One layout against the first, by one kind of speed."""

    speed_up: float
    efficiency: float  # speed-up / how many times as many ranks


@dataclass(frozen=True)
class OfflineReport:
    """A whole offline benchmark."""

    model: str
    device: str
    dtype: str
    input_len: int
    output_len: int
    rounds: int
    seed: int
    accelerator: str | None  # whose limits stand beside the figures
    layouts: tuple[LayoutFigures, ...]


def speed_of(
    batch: int, input_len: int, rounds: Sequence[Round], best: tuple[float | None, float | None]
) -> BatchSpeed:
    """The medians of some rounds; `best` are the limits of prefill and decode. Raises ValueError as `Round` does."""
    return BatchSpeed(
        batch,
        statistics.median(one.prefill_tokens_per_s(input_len) for one in rounds),
        statistics.median(one.decode_tokens_per_s() for one in rounds),
        *best,
    )


def scaling(
    layouts: Sequence[LayoutFigures], batch: int, rate: Callable[[BatchSpeed], float]
) -> list[tuple[LayoutFigures, BatchSpeed, Scaling]]:
    """Every layout at one batch size, against the first."""
    rows = [(layout, next(one for one in layout.speeds if one.batch == batch)) for layout in layouts]
    first_layout, first_speed = rows[0]
    found = []
    for layout, speed in rows:
        speed_up = rate(speed) / rate(first_speed)
        found.append((layout, speed, Scaling(speed_up, speed_up * first_layout.num_ranks / layout.num_ranks)))
    return found


def as_text(report: OfflineReport) -> str:
    """The report for people: tables of at most 100 columns."""
    head = [
        f"{report.model} on {report.device}, weights and cache in {report.dtype}",
        (
            f"{report.input_len} random tokens in, {report.output_len} out; medians of {report.rounds} rounds; "
            f"seed {report.seed}"
        ),
    ]
    sections = [
        head,
        _memory(report),
        _speeds(report, "Decode", lambda one: one.decode_tokens_per_s, lambda one: one.best_decode_tokens_per_s),
        _speeds(report, "Prefill", lambda one: one.prefill_tokens_per_s, lambda one: one.best_prefill_tokens_per_s),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _memory(report: OfflineReport) -> list[str]:
    rows = [("  TP x PP", "ranks", "start s", "load s", "weights", "cache", "blocks", "process")]
    rows += [
        (
            f"  {one}",
            str(one.num_ranks),
            f"{one.start_s:.1f}",
            f"{one.load_s:.1f}",
            size(max(one.weight_bytes)),
            size(max(one.cache_bytes)),
            str(one.num_blocks),
            size(max(filter(None, one.process_bytes), default=0)) if any(one.process_bytes) else "-",
        )
        for one in report.layouts
    ]
    return ["Start and memory, of the slowest and fullest rank", *aligned(rows)]


def _speeds(
    report: OfflineReport, name: str, rate: Callable[[BatchSpeed], float], best: Callable[[BatchSpeed], float | None]
) -> list[str]:
    has_best = report.accelerator is not None
    ms = ["ms a token"] if name == "Decode" else []
    at_best = [f"{report.accelerator} at best", "reached"] if has_best else []
    rows = [["  batch", "TP x PP", *ms, "tokens/s", "speed-up", "efficiency", *at_best]]
    for batch in (one.batch for one in report.layouts[0].speeds):
        for layout, speed, found in scaling(report.layouts, batch, rate):
            cells = [f"  {batch}", str(layout), *([f"{speed.ms_per_token:.2f}"] if ms else []), f"{rate(speed):.0f}"]
            cells += [f"{found.speed_up:.2f}", f"{found.efficiency:.0%}"]
            limit = best(speed)
            if has_best:
                cells += ["-", "-"] if limit is None else [f"{limit:.0f}", f"{rate(speed) / limit:.0%}"]
            rows.append(cells)
    return [f"{name} (speed-up and efficiency against {report.layouts[0]})", *aligned(rows)]
