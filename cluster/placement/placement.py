"""Where the stages can go: what each needs, what Ray is asked for, and whether the nodes have it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.placement import resources
from cluster.placement.packing import pack, spread
from cluster.placement.resources import Amounts, NodeFree, StageNeed, matches
from cluster.placement.table import explain
from cluster.topology import Topology
from configs.config import PlacementConfig

Strategy = Literal["PACK", "STRICT_PACK", "STRICT_SPREAD"]
Device = Literal["cpu", "cuda"]

__all__ = [  # with the data of `resources`, so that callers import one module
    "Device",
    "Fit",
    "InfeasiblePlacement",
    "NodeFree",
    "StageNeed",
    "Strategy",
    "check",
    "how_many",
    "make_bundles",
    "make_label_selectors",
    "make_needs",
    "resolve_device",
    "resolve_strategy",
]


@dataclass(frozen=True)
class Fit:
    """Whether the stages fit: a node for each (Ray may choose others), or what is short."""

    node_ids: tuple[str, ...] | None  # by stage; None: they do not fit now
    busy: bool  # they do not fit now, but would if nobody else held anything
    explanation: str  # a table for people, and one line with what would work


class InfeasiblePlacement(ValueError):
    """The stages do not fit the cluster; the message is the table of why. Raised before anything is reserved."""


def make_needs(
    topology: Topology, config: PlacementConfig, device: Device, memory_bytes: Sequence[int] | None = None
) -> list[StageNeed]:
    """What each stage needs; the first also hosts the replica. `memory_bytes` by stage; None reserves no memory."""
    shards = topology.tensor_parallel_size
    return [
        StageNeed(
            cpus=config.cpus_per_rank * shards + (config.cpus_per_replica if stage == 0 else 0),
            gpus=shards if device == "cuda" else 0,
            memory_bytes=memory_bytes[stage] if memory_bytes is not None else None,
            labels=dict(config.label_selector),
        )
        for stage in range(topology.pipeline_parallel_size)
    ]


def resolve_strategy(config: PlacementConfig, topology: Topology) -> Strategy:
    """The placement group's strategy; `auto` puts one stage on one node, and several on as few nodes as possible."""
    if config.strategy != "auto":
        return config.strategy
    return "STRICT_PACK" if topology.pipeline_parallel_size == 1 else "PACK"


def resolve_device(asked: Literal["auto", "cpu", "cuda"], nodes: Sequence[NodeFree]) -> Device:
    """The device of the ranks; `auto` is CUDA where any living node has a GPU."""
    if asked != "auto":
        return asked
    return "cuda" if any(node.alive and node.gpus for node in nodes) else "cpu"


def make_bundles(needs: Sequence[StageNeed]) -> list[dict[str, float]]:
    """The bundles of the placement group, in stage order, as Ray names resources."""
    bundles = []
    for need in needs:
        amounts = {"CPU": need.cpus, "GPU": float(need.gpus), "memory": float(need.memory_bytes or 0)}
        bundles.append({resource: amount for resource, amount in amounts.items() if amount})
    return bundles


def make_label_selectors(needs: Sequence[StageNeed]) -> list[dict[str, str]] | None:
    """One selector a bundle; None when no stage asks for labels."""
    return [dict(need.labels) for need in needs] if any(need.labels for need in needs) else None


def check(needs: Sequence[StageNeed], strategy: Strategy, nodes: Sequence[NodeFree]) -> Fit:
    """Find a node for every stage, or explain in one table what is short."""
    alive = [node for node in nodes if node.alive]
    chosen = _assign(needs, strategy, alive, [resources.free(node) for node in alive])
    if chosen is not None:
        return Fit(tuple(alive[index].node_id for index in chosen), busy=False, explanation="the stages fit")
    busy = _assign(needs, strategy, alive, [resources.has(node) for node in alive]) is not None
    return Fit(None, busy, explain(needs, strategy, nodes, busy))


def how_many(needs: Sequence[StageNeed], strategy: Strategy, nodes: Sequence[NodeFree], most: int | None = None) -> int:
    """How many times the stages fit what the nodes have free, each time on its own; at most `most` times."""
    left, count = list(nodes), 0
    while count != most and (chosen := check(needs, strategy, left).node_ids) is not None:
        count += 1
        for node_id, need in zip(chosen, needs, strict=True):
            left = [_without(node, need) if node.node_id == node_id else node for node in left]
    return count


def _without(node: NodeFree, need: StageNeed) -> NodeFree:
    return replace(
        node,
        free_cpus=node.free_cpus - need.cpus,
        free_gpus=node.free_gpus - need.gpus,
        free_memory_bytes=node.free_memory_bytes - (need.memory_bytes or 0),
    )


def _assign(
    needs: Sequence[StageNeed], strategy: Strategy, nodes: Sequence[NodeFree], room: list[Amounts]
) -> list[int] | None:
    """The index of a node for each stage, or None."""
    asked = [resources.asked(need) for need in needs]
    # Each selector is matched once: with 64 stages and 1000 nodes that is what takes the time.
    selectors = {tuple(sorted(need.labels.items())): need.labels for need in needs}
    answers = {key: [matches(selector, node.labels) for node in nodes] for key, selector in selectors.items()}
    allowed = [answers[tuple(sorted(need.labels.items()))] for need in needs]
    if strategy == "STRICT_PACK":
        total = tuple(sum(amount) for amount in zip(*asked, strict=True))
        for index, has in enumerate(room):
            if all(row[index] for row in allowed) and all(a <= h for a, h in zip(total, has, strict=True)):
                return [index] * len(needs)
        return None
    return spread(asked, room, allowed) if strategy == "STRICT_SPREAD" else pack(asked, room, allowed)
