"""What gpu_check.py prints at its end: the goals beside what was measured, then a table of each stage."""

from typing import Any, NamedTuple

ALL_REDUCE_MS = 0.01  # assumed of one: a shard alone exchanges nothing
NEVER = "-"

Rows = dict[str, list[dict[str, Any]]]  # of each stage


class Goal(NamedTuple):
    """A figure, what it was on an H100 at commit 0433da0, and what is aimed at there."""

    figure: str
    before: float | None
    done: float
    stretch: float | None
    unit: str
    is_less_better: bool = True


GOALS = [
    Goal("8B bf16, a step at batch 1", 8.78, 6.5, 6.0, "ms"),
    Goal("8B bf16, a step at batch 8", 11.67, 6.9, 6.3, "ms"),
    Goal("8B bf16, a step at batch 64", 32.95, 9.3, 8.5, "ms"),
    Goal("70B, shard 0 of 8, a step at batch 1, without all-reduces", 15.13, 8.9, 7.6, "ms"),
    Goal("70B, shard 0 of 8, a step at batch 64, without all-reduces", 18.44, 11.0, 9.5, "ms"),
    Goal("70B at TP 8, batch 1, 10 µs an all-reduce", 60, 95, 115, "tokens/s", False),
    Goal("prefill of 8B, chunks of 4,096, share of the matrix rate here", None, 0.50, 0.65, "", False),
    *(
        Goal(f"{peer}, batch {batch}, beside our step", None, 2.0, None, "×", False)
        for peer in ("generate", "continuous batching")
        for batch in (1, 8, 64)
    ),
    Goal("through HTTP, TPOT at 1 stream beside the bare step", None, 1.10, 1.05, "×"),
    Goal("through HTTP, tokens/s at 64 streams beside the bare steps", None, 0.85, 0.92, "×", False),
    Goal("from the replica's start to ready, 8B, page cache warm", None, 25, 15, "s"),
]


def measured(rows: Rows) -> dict[str, tuple[float, float | None]]:
    """What was measured of each figure, and its limit where there is one."""
    ours = {row["batch"]: row for row in rows.get("decode_8b", []) if "ms" in row}
    found: dict[str, tuple[float, float | None]] = {}
    for batch, row in ours.items():
        found[f"8B bf16, a step at batch {batch}"] = row["ms"], row["limit_ms"]
    found |= of_a_shard(rows.get("decode_70b", []))
    for row in rows.get("prefill", []):
        if row.get("chunk") == 4096 and "share_of_matmul" in row:
            found["prefill of 8B, chunks of 4,096, share of the matrix rate here"] = row["share_of_matmul"], 1.0
    for row in rows.get("transformers", []):
        if row.get("batch") in ours:
            found[f"{row['by']}, batch {row['batch']}, beside our step"] = row["ms"] / ours[row["batch"]]["ms"], None
    for row in rows.get("start", []):
        if "replica_to_ready_s" in row:
            found["from the replica's start to ready, 8B, page cache warm"] = row["replica_to_ready_s"], None
    return found | through_http(rows.get("http", []), ours)


def of_a_shard(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Those of one shard of eight, and what the gang would do."""
    steps = {row["batch"]: row for row in rows if "ms" in row}
    found: dict[str, tuple[float, float | None]] = {
        f"70B, shard 0 of 8, a step at batch {batch}, without all-reduces": (row["ms"], row["limit_ms"])
        for batch, row in steps.items()
    }
    if 1 in steps:
        reduces_ms = ALL_REDUCE_MS * sum(row.get("num_all_reduces", 0) for row in rows)
        ms, limit_ms = (steps[1][name] + reduces_ms for name in ("ms", "limit_ms"))
        found["70B at TP 8, batch 1, 10 µs an all-reduce"] = 1000 / ms, 1000 / limit_ms
    return found


def through_http(rows: list[dict[str, Any]], ours: dict[int, dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Streams whose prompts are cached, beside the bare steps of as many rows."""
    cached = {row["streams"]: row for row in rows if row.get("prompts") == "cached" and row["streams"] in ours}
    found: dict[str, tuple[float, float | None]] = {}
    if 1 in cached:
        found["through HTTP, TPOT at 1 stream beside the bare step"] = cached[1]["tpot_ms"] / ours[1]["ms"], 1.0
    if 64 in cached:
        share = cached[64]["tokens_per_s"] / ours[64]["tokens_per_s"]
        found["through HTTP, tokens/s at 64 streams beside the bare steps"] = share, 1.0
    return found


def goals(rows: Rows, is_judged: bool) -> list[dict[str, Any]]:
    """Each goal with what was measured, and a verdict: not measured, not yet, done, stretch."""
    found = measured(rows)
    return [
        {**goal._asdict(), "measured": value, "limit": limit, "verdict": verdict(goal, value, is_judged)}
        for goal in GOALS
        for value, limit in [found.get(goal.figure, (None, None))]
    ]


def verdict(goal: Goal, value: float | None, is_judged: bool) -> str:
    """`is_judged`: whether it was measured with the shapes and on the kind of device that the goals are for."""
    if value is None:
        return "not measured"
    if not is_judged:
        return "not judged here"

    def reaches(aim: float | None) -> bool:
        return aim is not None and (value <= aim if goal.is_less_better else value >= aim)

    return "stretch" if reaches(goal.stretch) else "done" if reaches(goal.done) else "not yet"


def text(results: dict[str, Any]) -> str:
    """The goals, then what each stage recorded."""
    head = ["figure", "", "limit", "at 0433da0", "measured", "done at", "stretch", "verdict"]
    body = [
        [goal["figure"], goal["unit"], goal["limit"], goal["before"], goal["measured"], goal["done"], goal["stretch"],
         goal["verdict"]]
        for goal in results["goals"]
    ]  # fmt: skip
    parts = [f"{key} {value}" for key, value in results["machine"].items()]
    pieces = [", ".join(parts), grid([head, *body])]
    for name, stage in results["stages"].items():
        reason = f": {stage['reason']}" if stage["reason"] else ""
        pieces.append(f"{name}: {stage['what']}: {stage['state']}, {stage['seconds']:.1f} s{reason}")
        pieces += tables(stage["rows"])
    return "\n\n".join(pieces) + "\n"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Rows with the same columns are one table; kernels are a table of their own."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    found = []
    for row in rows:
        if "kernels" in row:
            said = ", ".join(f"{key} {value}" for key, value in row.items() if key != "kernels")
            kernels = row["kernels"]
            total = sum(one["us"] for one in kernels)
            lines = [[one["kernel"], one["calls"], one["us"], one["us"] / total if total else 0] for one in kernels]
            found.append(
                f"kernels of a step, {said}: {total:.0f} µs\n" + grid([["kernel", "calls", "µs", "share"], *lines])
            )
        else:
            groups.setdefault(tuple(row), []).append(row)
    plain = [grid([list(columns), *([*row.values()] for row in some)]) for columns, some in groups.items()]
    return plain + found


def grid(lines: list[list[Any]]) -> str:
    """Columns of equal width; numbers to the right."""
    cells = [[cell(value) for value in line] for line in lines]
    widths = [min(70, max(map(len, column))) for column in zip(*cells, strict=True)]
    is_number = [all(not isinstance(line[i], str) for line in lines[1:]) for i in range(len(widths))]
    return "\n".join(
        "  ".join(
            text[:70].rjust(width) if right else text[:70].ljust(width)
            for text, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in cells
    )


def cell(value: Any) -> str:
    if value is None:
        return NEVER
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("\n", " ")
