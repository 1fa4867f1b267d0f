"""Serving under test: a Ray cluster of its own, the demo behind Serve on a free port, and what can be seen of both."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import ray
from ray import serve
from ray.util.placement_group import placement_group, remove_placement_group

import deployments.app
from actors.decisions.model.plan import make_plan
from actors.remote.gang import Gang
from cluster.topology import Topology
from configs.config import Config
from deployments.serve.environment import ENVIRONMENT
from tests.chaos.faults import haunted_actor
from tests.serving import ROOT, Served, free_port, until

MODEL = "demo"
_ENDS = re.compile(r"epoch (\d+) ends \(\w+\): (.*)")


def arguments(layout: tuple[int, int], **groups: dict[str, Any]) -> dict[str, Any]:
    """The `args` of a config file: the demo as (shards, stages), so small that four ranks fit on two cores."""
    return {
        "model": {"source": str(ROOT / "configs/demo"), "name": MODEL, "dtype": "float32", "max_model_len": 512},
        "parallel": {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1]},
        "device": "cpu",
        "cache": {"num_blocks": 512},
        "scheduler": {"max_num_seqs": 32},
        "placement": {"cpus_per_rank": 0.25, "cpus_per_replica": 0.5},
    } | groups


@contextmanager
def cluster(address: str = "local", **options: Any) -> Iterator[None]:
    """Ray as `make serve` starts it, where the environment says nothing else."""
    if address == "local":
        options |= {"num_cpus": 8, "num_gpus": 0, "include_dashboard": False}
    with mock.patch.dict(os.environ, ENVIRONMENT | {"RAY_SERVE_ENABLE_HA_PROXY": "0"} | os.environ):
        ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR", **options)
        try:
            yield
        finally:
            ray.shutdown()


@dataclass
class App(Served):
    """A served demo, and what its logs tell."""

    logs: Path
    cold_start_s: float = 0.0

    def epoch(self) -> int:
        """-1 while nobody says it."""
        try:
            return int(self.cluster()["epoch"])
        except (httpx.TransportError, ValueError, KeyError):
            return -1

    def failures(self) -> dict[int, str]:
        """By epoch, why it ended: what the engine told its operator."""
        told = {}
        for log in sorted(self.logs.glob("*.out")) + sorted(self.logs.glob("serve/*.log")):
            for epoch, words in _ENDS.findall(log.read_text(errors="replace")):
                told[int(epoch)] = words
        return told


@contextmanager
def served(args: dict[str, Any], folder: Path | None = None) -> Iterator[App]:
    """The demo behind Serve, once it is ready. With a folder the ranks obey spells, and keep those that act once there.

    One at a time in a cluster.
    """
    port = free_port()
    room: Any = deployments.app
    usual = room.LLMReplica
    if folder is not None:
        room.LLMReplica = haunted(usual, folder)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    began = time.monotonic()
    try:
        serve.run(deployments.app.build_app(args), name="chaos", route_prefix="/")
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        app = App(f"http://127.0.0.1:{port}", logs)
        until(app.is_ready)
        app.cold_start_s = time.monotonic() - began
        yield app
    finally:
        room.LLMReplica = usual
        serve.shutdown()


def haunted(usual: Any, folder: Path) -> Any:
    """The Serve deployment whose gangs have haunted ranks."""

    class HauntedReplica(usual.func_or_class):  # type: ignore[misc]
        async def __init__(self, *args: Any) -> None:  # type: ignore[misc] # as Serve's own class has it
            Gang.actor_class = haunted_actor(folder)
            await super().__init__(*args)

    return usual.options(func_or_class=HauntedReplica)


def cold_start_s(args: dict[str, Any]) -> float:
    """Seconds that a bare gang of this layout takes from nothing to ready: processes, imports, weights, warm-up."""
    from actors.tensors.model.spec_reader import read_spec

    config = Config.model_validate(args)
    topology = Topology(config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size)
    plan = make_plan(config, read_spec(Path(config.model.source), config.model.dtype))
    cpus = config.placement.cpus_per_rank * topology.tensor_parallel_size
    bundles = placement_group([{"CPU": cpus}] * topology.pipeline_parallel_size, strategy="PACK")
    ray.get(bundles.ready(), timeout=60)
    began = time.monotonic()
    gang = Gang(config, topology, bundles, "cpu")
    try:
        gang.start(plan)
        return time.monotonic() - began
    finally:
        gang.close()
        remove_placement_group(bundles)


def parameter(name: str, default: float) -> float:
    """A length that `NAME=… python -m pytest` sets."""
    return float(os.environ.get(name, default))
