"""Reads from Ray which nodes there are, what they have and what is free; waits until stages fit them."""

import logging
import time
from collections.abc import Callable, Sequence

import ray

# Not public, but the only source of what is free node by node (ray.nodes() has totals, ray.available_resources() one
# sum over the cluster) and of which nodes are being drained.
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster_state

from cluster.placement.placement import Fit, InfeasiblePlacement, Strategy, check
from cluster.placement.resources import NodeFree, StageNeed

logger = logging.getLogger(__name__)

_POLL_S = 1.0  # Ray's own figures of what is free are about that old
_SAY_EVERY_S = 30.0


def read_nodes() -> list[NodeFree]:
    """All nodes, dead ones too, in a stable order. Needs a connection to Ray; raises RuntimeError without one."""
    if not ray.is_initialized():
        raise RuntimeError("not connected to Ray: call ray.init() first")
    available = available_resources_per_node()
    nodes = []
    for entry in ray.nodes():
        total, free = entry["Resources"], available.get(entry["NodeID"], {})
        nodes.append(
            NodeFree(
                node_id=entry["NodeID"],
                name=f"{entry['NodeManagerHostname']} {entry['NodeManagerAddress']}",
                alive=bool(entry["Alive"]),
                cpus=float(total.get("CPU", 0)),
                gpus=int(total.get("GPU", 0)),
                memory_bytes=int(total.get("memory", 0)),
                free_cpus=float(free.get("CPU", 0)),
                free_gpus=float(free.get("GPU", 0)),
                free_memory_bytes=int(free.get("memory", 0)),
                labels=dict(entry.get("Labels") or {}),
            )
        )
    return sorted(nodes, key=lambda node: (not node.alive, node.name, node.node_id))


def draining_nodes() -> dict[str, float]:
    """All nodes that are drained: node id → when it will be gone, in seconds since 1970 (0: not known)."""
    return {node: deadline_ms / 1000 for node, deadline_ms in cluster_state.get_draining_nodes().items()}


def wait_for(
    needs: Sequence[StageNeed],
    strategy: Strategy,
    wait_s: float,
    may_be_busy: bool = False,
    read: Callable[[], list[NodeFree]] = read_nodes,
) -> Fit:
    """Check until the stages fit, for at most `wait_s` seconds; 0 checks once. Raises InfeasiblePlacement.

    With `may_be_busy` it is enough that they fit an idle cluster: when an application is deployed again, its old
    replica still holds what the new one will get.
    """
    deadline = time.monotonic() + wait_s
    said_at = float("-inf")
    while True:
        fit = check(needs, strategy, read())
        if fit.node_ids is not None or (fit.busy and may_be_busy):
            return fit
        now = time.monotonic()
        if now >= deadline:
            waited = f" after {wait_s:g} s" if wait_s else ""
            raise InfeasiblePlacement(f"placement{waited}: {fit.explanation}")
        if now - said_at >= _SAY_EVERY_S:
            said_at = now
            logger.warning("waiting up to %.0f s for nodes: %s", deadline - now, fit.explanation)
        time.sleep(min(_POLL_S, deadline - now))
