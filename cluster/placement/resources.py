"""What stages ask of nodes and what nodes have: the plain data of placement."""

import re
from dataclasses import dataclass, field

RESOURCES = ("CPU", "GPU", "memory")
Amounts = tuple[int, ...]  # of RESOURCES, in whole units: ten-thousandths as Ray counts, and bytes
_UNITS = 10_000


@dataclass(frozen=True)
class StageNeed:
    """What one stage asks of one node, as a bundle never spans nodes."""

    cpus: float
    gpus: int
    memory_bytes: int | None = None  # host memory that Ray reserves; None: not reserved
    labels: dict[str, str] = field(default_factory=dict, hash=False)  # Ray's selectors: v, !v, in(a,b), !in(a,b)

    def __post_init__(self) -> None:
        if not self.cpus and not self.gpus:
            raise ValueError("placement.cpus_per_rank: a stage without GPUs must ask for CPUs; set it above 0")


@dataclass(frozen=True)
class NodeFree:
    """What one node has, and how much of that is free."""

    node_id: str
    name: str
    alive: bool = True
    cpus: float = 0.0
    gpus: int = 0
    memory_bytes: int = 0
    free_cpus: float = 0.0
    free_gpus: float = 0.0  # Ray can give away parts of a GPU
    free_memory_bytes: int = 0
    labels: dict[str, str] = field(default_factory=dict, hash=False)


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a node's labels satisfy Ray's selector: `v`, `!v`, `in(a,b)` or `!in(a,b)` by key.

    As in Ray, a missing label satisfies the negative forms only.
    """
    for key, wanted in selector.items():
        negative = wanted.startswith("!")
        listed = re.fullmatch(r"!?in\((.*)\)", wanted)
        values = [value.strip() for value in listed.group(1).split(",")] if listed else [wanted.removeprefix("!")]
        if (labels.get(key) in values) == negative:
            return False
    return True


def asked(need: StageNeed) -> Amounts:
    """(CPU, GPU, memory) of a stage."""
    return round(need.cpus * _UNITS), need.gpus * _UNITS, need.memory_bytes or 0


def has(node: NodeFree) -> Amounts:
    """(CPU, GPU, memory) that a node has in all."""
    return round(node.cpus * _UNITS), node.gpus * _UNITS, node.memory_bytes


def free(node: NodeFree) -> Amounts:
    """(CPU, GPU, memory) of a node that nobody holds."""
    # A bundle takes whole GPUs, so the rest of a shared one is of no use.
    return round(node.free_cpus * _UNITS), int(node.free_gpus) * _UNITS, node.free_memory_bytes
