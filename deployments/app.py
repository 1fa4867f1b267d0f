"""The Serve application: checks a config against the cluster, reserves one bundle a stage, and places the replica.

Imports no torch and no Transformers until the replica starts: what is short is said seconds after Ray is up.
"""

import asyncio
import time
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.util.placement_group import PlacementGroup, placement_group_table

from actors.tensors.backends.choose import placed_on
from cluster.placement.nodes import draining_nodes, read_nodes, wait_for
from cluster.placement.placement import make_bundles, make_label_selectors, make_needs, resolve_device, resolve_strategy
from cluster.topology import Topology
from configs.config import Config
from configs.files import parse_args
from deployments.gangs import check_model
from deployments.serve.drain import Drain, leaving_node

_DEPLOYMENT = "LLMReplica"
_ENDING_S = 10.0  # for a drained replica to end; on top of timeouts.drain_s
_NUM_BESIDE = (
    1024  # requests beside the admitted ones that must not wait in Serve's queue: health, refusals, slow bodies
)


@serve.deployment(name=_DEPLOYMENT)
@serve.ingress()
class LLMReplica:
    """The thin Serve shell around a Replica."""

    async def __init__(self, config: Config, device: str) -> None:  # type: ignore[misc] # Serve awaits it
        """Returns when the gang serves; an exception fails the deployment with its message.

        Loading takes minutes, so it happens in a thread: `make serve` lets Serve's own event loop run here.
        """
        from deployments.serve.replica import Replica

        placement = ray.util.get_current_placement_group()
        assert placement is not None, "Serve makes the placement group that the builder asks for"
        self._replica = await asyncio.to_thread(Replica, config, device, placement)
        service, drain_s = self._replica.app.state.service, config.timeouts.drain_s
        self._drain = Drain(service, drain_s, give_up=service.engine.close)
        self._drain.watch(partial(_leaving_node, placement, drain_s + _ENDING_S))

    def __serve_build_asgi_app__(self) -> Any:
        """The HTTP app; Serve asks for it after the constructor."""
        return self._replica.app

    def check_health(self) -> None:
        """Raises when the gang cannot come back, or a stage's node is drained: Serve then replaces the replica."""
        self._replica.check_health()
        if self._drain.reason:
            raise RuntimeError(self._drain.reason)

    async def metrics_page(self) -> bytes:
        """The metrics of this replica alone, for the other ones."""
        return self._replica.metrics_page()

    async def drain(self) -> None:
        """Refuse new requests; returns when the running ones have ended. (Serve's own stop waits, but refuses none.)"""
        await self._drain.finish()

    def __del__(self) -> None:
        """Called by Serve at the end: stop engine and gang."""
        if hasattr(self, "_drain"):
            self._drain.stop_watching()
        if hasattr(self, "_replica"):
            self._replica.close()


def build_app(args: dict[str, Any]) -> Application:
    """The application for the `args` of a Serve config file. Runs on the cluster, before anything is reserved.

    Raises ValueError (what was asked is wrong) or InfeasiblePlacement (the cluster cannot take it).
    """
    config = parse_args(args)
    parallel, placement = config.parallel, config.placement
    topology = Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    check_model(config, topology)
    device = resolve_device(placed_on(config.device), read_nodes())
    needs = make_needs(topology, placement, device)
    strategy = resolve_strategy(placement, topology)
    wait_for(needs, strategy, placement.wait_s, may_be_busy=_is_deployed())
    deployment: serve.Deployment = LLMReplica
    replica = deployment.options(
        placement_group_bundles=make_bundles(needs),
        placement_group_strategy=strategy,
        placement_group_bundle_label_selector=make_label_selectors(needs),
        ray_actor_options={"num_cpus": placement.cpus_per_replica, "num_gpus": 0},
        max_ongoing_requests=config.admission.max_requests + _NUM_BESIDE,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.timeouts.drain_s + _ENDING_S,
    )
    return replica.bind(config, device)


def _leaving_node(placement: PlacementGroup, last_s: float) -> str | None:
    draining = draining_nodes()
    if not draining:
        return None
    stages = placement_group_table(placement)["bundles_to_node_id"].values()
    own = ray.get_runtime_context().get_node_id()
    return leaving_node(own, set(stages), draining, time.time(), last_s)


def _is_deployed() -> bool:
    """Whether an older replica holds bundles: Serve stops it, and frees them, before it starts the new one."""
    groups = placement_group_table().values()
    return any(group["state"] == "CREATED" and _DEPLOYMENT in group["name"] for group in groups)
