"""Measures the links inside and between stages, over bundles that Ray has reserved: a process for each rank."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from actors.remote.actor_pool import actor_options
from cluster.collectives.network import own_place, pin_interface
from cluster.placement.devices import own_device
from cluster.placement.nvml import read_gpus
from cluster.placement.placement import Device
from cluster.topology import Topology
from configs.config import Config
from deployments.doctor.gpu_findings import by_whom, is_used
from deployments.gangs import reserved

if TYPE_CHECKING:
    from cluster.collectives.speed import Rates

_START_S = 60.0  # for all processes of a node to import torch at once
_JOIN_S = 20.0
_MEASURE_S = 30.0
_RESERVE_S = 10.0


@dataclass(frozen=True)
class Layout:
    """The ranks that are measured."""

    config: Config
    device: Device

    @property
    def topology(self) -> Topology:
        """The grid of ranks."""
        parallel = self.config.parallel
        return Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)


@dataclass(frozen=True)
class Measured:
    """By rank: its node's address, Ray's name of its GPU, and what it measured; and each pair's copies in a stage."""

    addresses: tuple[str, ...]
    gpus: tuple[str | None, ...]
    rates: "tuple[Rates, ...]"
    pairs: dict[tuple[int, int, int], float]  # (stage, shard, shard) → bytes a second


class NotStarted(ValueError):
    """There are no ranks to measure with: nothing is known of the links."""


class LinkProbe:
    """One rank, for as long as it takes to measure."""

    def __init__(self, interface: str | None) -> None:
        self._device, self._gpu = own_device()
        self._place = own_place(interface)
        pin_interface(self._place.interface)

    def where(self) -> tuple[str, str, str | None]:
        """(The node's own address, the device, Ray's name of the GPU)."""
        import cluster.collectives.speed  # noqa: F401 - torch, before the time counts

        return self._place.address, self._device, self._gpu

    def users(self) -> str | None:
        """Who else uses the GPU that this process was given; None: nobody, as far as NVML says."""
        return None if self._gpu is None else users_of(self._gpu)

    def host_store(self) -> int:
        """Serve the store where all ranks meet → its port."""
        from cluster.collectives.rendezvous import host_store

        self._store, port = host_store(self._place.address)
        return port

    def measure(self, topology: Topology, rank: int, meeting: tuple[str, int]) -> "Rates":
        """See `cluster.collectives.speed.measure`."""
        from cluster.collectives.speed import measure

        return measure(topology, rank, meeting, self._device, self._place.address, _JOIN_S)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> list[float]:
        """Copies between GPUs of this node, by torch's index, one pair after the other → bytes a second."""
        from cluster.collectives.speed import pair_rate

        return [pair_rate(source, target) for source, target in pairs]


def users_of(assigned_id: str) -> str | None:
    """What NVML says of others on the GPU that Ray calls so; None: nobody uses it, or NVML does not know it."""
    found = read_gpus()
    for gpu in found.gpus if found is not None else ():
        if assigned_id in (str(gpu.index), gpu.uuid) and is_used(gpu):
            return f"GPU {gpu.index}, which Ray had free, is used{by_whom(gpu)}"
    return None


def measure_links(layout: Layout) -> Measured:
    """Reserve, start, measure and give back. Raises ValueError that says what stood in the way; NotStarted."""
    topology = layout.topology
    patience = layout.config.timeouts.model_copy(update={"start_s": _RESERVE_S})
    with contextlib.ExitStack() as held:
        try:
            group = held.enter_context(
                reserved(layout.config.model_copy(update={"timeouts": patience}), topology, layout.device)
            )
        except ValueError:
            raise NotStarted(f"Ray has not reserved the bundles within {_RESERVE_S:g} s") from None
        actors: list[Any] = []
        for rank in range(topology.num_ranks):
            options = actor_options(group, topology.stage(rank), layout.device)
            actors.append(ray.remote(LinkProbe).options(**options).remote(layout.config.network.interface))
        try:
            where = _started([actor.where.remote() for actor in actors])
            # Before any CUDA: a context takes memory
            if users := sorted(set(filter(None, _started([actor.users.remote() for actor in actors])))):
                raise NotStarted("; ".join(users))
            meeting = (where[0][0], _all([actors[0].host_store.remote()], "opened a store", _JOIN_S)[0])
            calls = [actor.measure.remote(topology, rank, meeting) for rank, actor in enumerate(actors)]
            rates = _all(calls, "measured", _JOIN_S + _MEASURE_S)
            devices = [device for _, device, _ in where]
            pairs = _copy_pairs(topology, actors, devices) if layout.device == "cuda" else {}
        finally:
            for actor in actors:
                ray.kill(actor)
    return Measured(tuple(one[0] for one in where), tuple(one[2] for one in where), tuple(rates), pairs)


def _copy_pairs(topology: Topology, actors: Sequence[Any], devices: Sequence[str]) -> dict[tuple[int, int, int], float]:
    """Shard 0 of each stage copies between all GPUs of its stage, which are all reserved for us."""
    calls, keys = [], []
    for stage in range(topology.pipeline_parallel_size):
        indices = [int(devices[rank].partition(":")[2]) for rank in topology.stage_ranks(stage)]
        shards = [(a, b) for a in range(len(indices)) for b in range(len(indices)) if a != b]
        keys.append([(stage, a, b) for a, b in shards])
        calls.append(actors[topology.rank(stage, 0)].copy.remote([(indices[a], indices[b]) for a, b in shards]))
    rates = _all(calls, "copied between their GPUs", _MEASURE_S)
    return {
        key: rate
        for found, of_stage in zip(rates, keys, strict=True)
        for key, rate in zip(of_stage, found, strict=True)
    }


def _started(calls: Sequence[Any]) -> list[Any]:
    try:
        return _all(calls, "started", _START_S)
    except ValueError as error:
        raise NotStarted(str(error)) from None


def _all(calls: Sequence[Any], what: str, within_s: float) -> list[Any]:
    deadline = time.monotonic() + within_s
    try:
        return [ray.get(call, timeout=max(0.0, deadline - time.monotonic())) for call in calls]
    except TimeoutError:
        raise ValueError(f"ranks have not {what} within {within_s:g} s") from None
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ValueError(f"ranks have not {what}: {str(cause).strip().splitlines()[-1]}") from None
