"""What `/cluster` and the metrics show of the engine."""

from dataclasses import dataclass
from typing import Literal

from actors.decisions.schedule.captures import GraphState

EngineState = Literal["starting", "ready", "recovering", "failed", "stopped"]


@dataclass(frozen=True)
class Snapshot:
    """Taken without a lock: the numbers may be a step apart."""

    state: EngineState
    epoch: int
    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    graphs: GraphState
