"""`stagemesh plan` for people: the PlanReport as aligned text of at most 100 columns."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from textwrap import wrap

from actors.decisions.model.estimate import Speed
from deployments.plan.report import PlanReport, RankRow

_FEW = 8  # ranks that are listed one by one
_WIDTH = 100  # columns


def as_text(report: PlanReport) -> str:
    """The whole text, section by section."""
    sections = [
        _head(report),
        _bullets("Notes", report.notes),
        _ranks(report),
        _memory(report),
        _exchange(report),
        _speed(report),
        _layouts(report),
        _bullets("Assumed", report.assumptions),
        _bullets("This does not fit", report.problems),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _bullets(head: str, items: Sequence[str]) -> list[str]:
    """A list under its head; nothing where it is empty."""
    lines = [line for item in items for line in wrap(item, _WIDTH, initial_indent="  - ", subsequent_indent="    ")]
    return [head, *lines] if lines else []


def _head(report: PlanReport) -> list[str]:
    tp, pp = report.tensor_parallel_size, report.pipeline_parallel_size
    return [
        f"{report.architecture}, {report.parameters / 1e9:.2f} B parameters, read from {report.source}",
        f"{tp} shards x {pp} stages = {tp * pp} x {report.accelerator}, weights and cache in {report.dtype}",
    ]


def _ranks(report: PlanReport) -> list[str]:
    """One row a rank; where there are many, equal shards of a stage share a row."""
    if len(report.ranks) <= _FEW:
        rows = [(str(row.rank), str(row.shard), row) for row in report.ranks]
    else:
        rows = []
        for _, of_kind in groupby(report.ranks, key=lambda row: (row.stage, row.heads, row.kv_heads, row.ffn_columns)):
            alike = list(of_kind)
            rows.append((_run(alike[0].rank, alike[-1].rank), _run(alike[0].shard, alike[-1].shard), _largest(alike)))
    cells = [
        (
            ranks,
            str(row.node),
            str(row.stage),
            shards,
            _run(row.layers[0], row.layers[1] - 1),
            str(row.heads),
            str(row.kv_heads),
            str(row.ffn_columns or "whole"),
            str(row.vocabulary_rows or "-"),
            size(row.weight_bytes),
        )
        for ranks, shards, row in rows
    ]
    head = ("rank", "node", "stage", "shard", "layers", "heads", "KV heads", "ffn cols", "vocab rows", "weights")
    return _aligned([head, *cells])


def _largest(rows: Sequence[RankRow]) -> RankRow:
    return max(rows, key=lambda row: row.weight_bytes)


def _memory(report: PlanReport) -> list[str]:
    fullest = min(report.ranks, key=lambda row: row.memory.cache_bytes)
    memory = fullest.memory
    lines = [
        "Memory",
        f"  whole model            {size(report.fp32_weight_bytes)} in fp32, {size(report.bf16_weight_bytes)} in bf16",
        f"  all ranks together     {size(report.planned_weight_bytes)} of weights, with what several ranks hold",
        (
            f"  KV cache of a token    {size(report.kv_bytes_per_token)} in all, "
            f"{size(max(report.kv_bytes_per_token_by_rank))} on the fullest rank"
        ),
        (
            f"  rank {fullest.rank:<5}             {size(memory.weight_bytes)} weights, "
            f"{size(memory.activation_bytes)} activations, {size(max(0, memory.cache_bytes))} cache"
        ),
        (
            f"  blocks                 {report.num_blocks} of {report.block_size} tokens; longest context "
            f"{report.longest_context} of {report.max_model_len} tokens"
        ),
    ]
    if report.latent_kv_bytes_per_token is not None:
        lines.append(
            f"  latent attention       is cached expanded to whole heads; the latent would take "
            f"{size(report.latent_kv_bytes_per_token)} a token"
        )
    if report.has_windows:
        lines.append("  windowed layers        keep all tokens in the cache, not only those of the window")
    return lines


def _exchange(report: PlanReport) -> list[str]:
    lines = [
        "Exchange",
        (
            f"  inside a stage         {report.all_reduces_per_step} all-reduces a step in all stages, "
            f"{size(report.all_reduce_bytes_per_token)} a token each"
        ),
    ]
    if report.hop_bytes_per_token:
        lines.append(f"  between stages         {size(report.hop_bytes_per_token)} a token")
    return lines


def _speed(report: PlanReport) -> list[str]:
    rows = [("  batch", "ms a token", "tokens/s", "limited by")]
    rows += [
        (
            f"  {one.batch}",
            _or_dash(one, f"{one.ms_per_token:.2f}"),
            _or_dash(one, f"{one.tokens_per_s:.0f}"),
            _limit(one),
        )
        for one in report.decode
    ]
    return [
        f"Speed, estimated for contexts of {report.context} tokens",
        *_aligned(rows),
        f"  prefill {report.prefill_tokens_per_s:.0f} tokens/s",
    ]


def _layouts(report: PlanReport) -> list[str]:
    if not report.layouts:
        return []
    rows = [("  TP x PP", "GPUs", "fits", "longest context", "ms a token, batch 1", "tokens/s, batch 64")]
    rows += [
        (
            f"  {one.tensor_parallel_size} x {one.pipeline_parallel_size}",
            str(one.gpus),
            "yes" if one.fits else "no",
            str(one.longest_context),
            _or_dash(one.speeds[0], f"{one.speeds[0].ms_per_token:.2f}"),
            _or_dash(one.speeds[-1], f"{one.speeds[-1].tokens_per_s:.0f}"),
        )
        for one in report.layouts
    ]
    return [f"Layouts on {report.accelerator}: the best a GPU first", *_aligned(rows)]


def _or_dash(speed: Speed, number: str) -> str:
    return number if speed.running else "-"


def _limit(speed: Speed) -> str:
    if not 0 < speed.running < speed.batch:
        return speed.limited_by
    return f"{speed.limited_by}, {speed.running} at a time"


def size(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point; GB are 10^9, as data sheets count."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes} B"


def _run(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell, numbers to the right."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
