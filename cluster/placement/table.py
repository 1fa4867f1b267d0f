"""The table that shows people why stages do not fit the nodes, and what would work."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from cluster.placement.resources import RESOURCES, NodeFree, StageNeed, asked, free, has, matches

_GIB = 1 << 30
_MOST_ROWS = 40  # rows of nodes; equal nodes share a row


def explain(needs: Sequence[StageNeed], strategy: str, nodes: Sequence[NodeFree], busy: bool) -> str:
    """The stages and their sum, the nodes and their sum, and one line with what would work."""
    alive = [node for node in nodes if node.alive]
    counted = "the stage does" if len(needs) == 1 else f"the {len(needs)} stages do"
    return "\n".join(
        [
            f"{counted} not fit the cluster{' now' if busy else ''} (strategy {strategy})",
            _columns([("", "CPU", "GPU", "memory", "labels"), *_need_rows(needs)]),
            "",
            _columns([("free / has", "CPU", "GPU", "memory", ""), *_node_rows(needs, nodes)]),
            "",
            "what would work: " + _remedy(needs, strategy, alive, busy),
        ]
    )


def _need_rows(needs: Sequence[StageNeed]) -> list[tuple[str, ...]]:
    rows = []
    stage = 0
    for need, group in groupby(needs):
        count = len(list(group))
        name = f"stage {stage}" if count == 1 else f"stages {stage}-{stage + count - 1}, each"
        labels = ", ".join(f"{key}={value}" for key, value in need.labels.items())
        rows.append((name, _number(need.cpus), _number(need.gpus), _memory(need.memory_bytes), labels))
        stage += count
    memory = sum(need.memory_bytes or 0 for need in needs)
    sums = (_number(sum(need.cpus for need in needs)), _number(sum(need.gpus for need in needs)), _memory(memory), "")
    return [*rows, ("sum", *sums)]


def _node_rows(needs: Sequence[StageNeed], nodes: Sequence[NodeFree]) -> list[tuple[str, ...]]:
    names: dict[tuple[str, ...], list[str]] = {}
    for node in nodes:
        row = (
            f"{_number(node.free_cpus)} / {_number(node.cpus)}",
            f"{_number(node.free_gpus)} / {_number(node.gpus)}",
            f"{_memory(node.free_memory_bytes)} / {_memory(node.memory_bytes)}",
            _note(needs, node),
        )
        names.setdefault(row, []).append(node.name)
    rows: list[tuple[str, ...]] = [
        (who[0] if len(who) == 1 else f"{len(who)} nodes like {who[0]}", *row) for row, who in names.items()
    ]
    if len(rows) > _MOST_ROWS:
        rows = [*rows[:_MOST_ROWS], (f"and {len(rows) - _MOST_ROWS} more kinds of node", "", "", "", "")]
    alive = [node for node in nodes if node.alive]
    cpus = f"{_number(sum(node.free_cpus for node in alive))} / {_number(sum(node.cpus for node in alive))}"
    gpus = f"{_number(sum(node.free_gpus for node in alive))} / {_number(sum(node.gpus for node in alive))}"
    memory = f"{_memory(sum(n.free_memory_bytes for n in alive))} / {_memory(sum(n.memory_bytes for n in alive))}"
    return [*rows, ("sum", cpus, gpus, memory, f"{len(alive)} alive")]


def _note(needs: Sequence[StageNeed], node: NodeFree) -> str:
    """Why a node cannot host any of the stages; of several reasons the one that is easiest to remove."""
    if not node.alive:
        return "dead"
    obstacles = []
    for need in dict.fromkeys(needs):
        absent, held = _short(asked(need), has(node)), _short(asked(need), free(node))
        if not matches(need.labels, node.labels):
            obstacles.append((3, "other labels"))
        elif absent:
            obstacles.append((2, f"too small: {', '.join(absent)}"))
        elif held:
            obstacles.append((1, f"busy: {', '.join(held)}"))
        else:
            return "has room for a stage"
    return min(obstacles)[1]


def _short(amounts: Iterable[int], room: Iterable[int]) -> list[str]:
    return [name for name, asks, gives in zip(RESOURCES, amounts, room, strict=True) if asks > gives]


def _remedy(needs: Sequence[StageNeed], strategy: str, alive: Sequence[NodeFree], busy: bool) -> str:
    if not alive:
        return "the cluster has no living node: start one (`ray start`)"
    if busy:
        return (
            "the nodes are large enough, but busy: stop what holds them (`ray status` and "
            "`ray list placement-groups` show it), or set placement.wait_s to wait for it"
        )
    for need in dict.fromkeys(needs):
        if not any(matches(need.labels, node.labels) and not _short(asked(need), has(node)) for node in alive):
            return _remedy_for_one(need, alive)
    if strategy == "STRICT_SPREAD":
        return (
            f"STRICT_SPREAD puts each of the {len(needs)} stages on a node of its own, and too few nodes fit one: "
            "add nodes, set placement.strategy to PACK, or lower parallel.pipeline_parallel_size"
        )
    if strategy == "STRICT_PACK" and len(needs) > 1:
        return "STRICT_PACK puts all stages on one node, and none has the sum: set placement.strategy to PACK"
    return (
        f"each stage fits alone, but not all {len(needs)} together: add nodes, or lower "
        "parallel.pipeline_parallel_size or placement.cpus_per_rank"
    )


def _remedy_for_one(need: StageNeed, alive: Sequence[NodeFree]) -> str:
    """What would work for a stage that fits no node, even an idle one."""
    fitting = [node for node in alive if matches(need.labels, node.labels)]
    if not fitting:
        asks = ", ".join(f"{key}={value}" for key, value in need.labels.items())
        there = sorted({f"{key}={node.labels[key]}" for node in alive for key in need.labels if key in node.labels})
        return (
            f"no node has the labels {asks} (there are: {', '.join(there) or 'none of these keys'}): "
            "change placement.label_selector, or add such a node"
        )
    gpus = max(node.gpus for node in fitting)
    if gpus < need.gpus:
        smaller = f"parallel.tensor_parallel_size to at most {gpus}" if gpus else "device to cpu"
        return (
            f"no node has {need.gpus} GPUs; the largest has {gpus}: set {smaller}, or add a node with {need.gpus} GPUs"
        )
    cpus = max(node.cpus for node in fitting)
    if cpus < need.cpus:
        return (
            f"no node has {_number(need.cpus)} CPUs; the largest has {_number(cpus)}: lower placement.cpus_per_rank "
            f"or parallel.tensor_parallel_size, or add a node with {_number(need.cpus)} CPUs"
        )
    memory = max(node.memory_bytes for node in fitting)
    if memory < (need.memory_bytes or 0):
        return (
            f"no node has {_memory(need.memory_bytes)} of memory; the largest has {_memory(memory)}: raise "
            f"parallel.pipeline_parallel_size, or add a node with {_memory(need.memory_bytes)}"
        )
    return "no single node has all that a stage needs at once: add one that has, or lower placement.cpus_per_rank"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Lines of names to the left, figures to the right, and a free last column; empty columns are left out."""
    filled = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in filled]
    lines = []
    for row in zip(*filled, strict=True):
        cells = [row[0].ljust(widths[0])]
        for title, cell, width in zip((column[0] for column in filled[1:]), row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width) if title in RESOURCES else cell)
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(amount: float) -> str:
    return f"{amount:g}"


def _memory(nbytes: int | None) -> str:
    return f"{nbytes / _GIB:.1f} GiB" if nbytes else "0"
