"""Gangs without Serve and HTTP, for commands: Ray's connection, the reservation, a gang, and requests through it."""

import contextlib
import json
import os
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.sizes import Sizes, broken_constraints
from actors.decisions.model.spec import ModelSpec
from actors.remote.engine import Engine
from actors.remote.gang import Gang
from actors.tensors.backends.choose import default_block_size, placed_on
from actors.tensors.weights.source import local_folder
from actors.words.messages import Event, Request
from cluster.placement.nodes import read_nodes, wait_for
from cluster.placement.placement import (
    Device,
    make_bundles,
    make_label_selectors,
    make_needs,
    resolve_device,
    resolve_strategy,
)
from cluster.topology import Topology
from configs.config import Config
from deployments.api.sampling_defaults import SamplingDefaults
from deployments.serve.environment import ENVIRONMENT

_SILENCE_S = 600.0  # without any event; then the gang counts as broken


@contextlib.contextmanager
def connected_to_ray(namespace: str) -> Iterator[None]:
    """Use the cluster that RAY_ADDRESS names, or one that is started here and ended. Raises ValueError."""
    if ray.is_initialized():
        yield
        return
    for key in ("RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness"):
        os.environ.setdefault(key, ENVIRONMENT[key])
    try:
        ray.init(namespace=namespace, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"Ray: {error}; if RAY_ADDRESS names a cluster, it must run") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_model(config: Config, topology: Topology) -> None:
    """Refuse a local checkpoint that is missing, cannot be cut so, or has sampling defaults that cannot be taken.

    Raises ValueError. A hub id is checked once it is downloaded.
    """
    folder = local_folder(config.model.source, config.model.revision)
    if folder is not None:
        sizes = Sizes.guess(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        reasons = broken_constraints(sizes, topology) if sizes else []
        if reasons:
            raise ValueError("\n".join(reasons))
        SamplingDefaults.read(folder, config.model.generation_config)


def plan_for_cluster(config: Config, spec: ModelSpec) -> tuple[Plan, Device]:
    """The plan on the devices that the cluster has, once its nodes have room. Raises ValueError where they have not."""
    device = resolve_device(placed_on(config.device), read_nodes())
    plan = make_plan(config, spec, default_block_size(config.device, device))
    needs = make_needs(plan.topology, config.placement, device)
    wait_for(needs, resolve_strategy(config.placement, plan.topology), config.placement.wait_s)
    return plan, device


@contextlib.contextmanager
def reserved(config: Config, topology: Topology, device: Device) -> Iterator[PlacementGroup]:
    """A placement group with one bundle a stage; Ray waits until resources given back before are free again."""
    needs = make_needs(topology, config.placement, device)
    strategy = resolve_strategy(config.placement, topology)
    group = placement_group(make_bundles(needs), strategy, bundle_label_selector=make_label_selectors(needs))
    try:
        if not group.wait(config.timeouts.start_s):
            raise ValueError("Ray has not reserved the bundles in time; raise timeouts.start_s")
        yield group
    finally:
        remove_placement_group(group)


class Session:
    """Sends requests to the engine of a gang that has started. Events are noted with the time at which they came."""

    def __init__(self, gang: Gang, plan: Plan) -> None:
        self.plan, self.num_blocks = plan, gang.num_blocks
        self._events: queue.SimpleQueue[tuple[float, list[Event]]] = queue.SimpleQueue()
        self._engine = Engine(gang.executor, plan.scheduler, gang.num_blocks, self._deliver)

    def _deliver(self, events: list[Event]) -> None:
        self._events.put((time.perf_counter(), events))

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[float, Event]]:
        """Submit requests together → their events, each with its time.perf_counter(), until all have ended.

        Raises ValueError when nothing happens for long.
        """
        for request in requests:
            self._engine.add(request)
        num_running = len(requests)
        while num_running:
            try:
                now, events = self._events.get(timeout=_SILENCE_S)
            except queue.Empty:
                raise ValueError(f"the gang has said nothing for {_SILENCE_S:g} s; look at the ranks' logs") from None
            for event in events:
                num_running -= event.finish_reason is not None
                yield now, event

    def __enter__(self) -> Self:
        self._engine.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()


def say(words: str) -> None:
    """Tell people how far a command is."""
    sys.stderr.write(words + "\n")
