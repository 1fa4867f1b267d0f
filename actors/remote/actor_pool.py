"""The processes of a gang on Ray: an actor for each rank, and spares that can take a rank over."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

# Not public, but the only way to ask without Ray's dashboard where an actor listens; nor is an actor's id
from ray._private.state import actors as actor_table
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.decisions.failure.culprit import CrashReport
from actors.decisions.model.plan import Plan
from actors.remote.black_box import BlackBox, CrashFile, collect_crash_report
from actors.remote.imports import collector_paused, compiler_left_out
from actors.remote.meeting import Assignment
from actors.remote.stage_links import along_links, refuse_unknown, slow_pairs
from cluster.collectives.network import Place, knock, open_door, own_place, pin_interface
from cluster.placement.devices import own_device
from cluster.placement.nvlink import Joined
from cluster.placement.nvml import links_between
from cluster.topology import Topology
from configs.config import Config

logger = logging.getLogger(__name__)

Gather = Callable[[list[Any], str, Sequence[int]], list[Any]]  # waits for a call each of these ranks → their results


@dataclass(frozen=True)
class WorkerInfo:
    """What a rank's process reports once it is up."""

    pid: int
    place: Place
    device: str  # cpu, or cuda:<index>
    crash_file: CrashFile
    gpu: str | None = None  # as Ray calls it


class RankActor:
    """The Ray actor around a Rank. All actors import torch at the same time, while the replica makes the plan."""

    def __init__(self, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
        self._device, self._gpu = own_device()
        with collector_paused(), compiler_left_out():
            import actors.remote.rank  # noqa: F401
            from actors.tensors.backends.choose import import_backend

            import_backend(config.device, "cpu" if self._gpu is None else "cuda")
        self._config = config
        self._rank: Any = None
        self._rank_number = -1
        self._black_box = BlackBox()
        self._door: socket.socket | None = None

    def info(self) -> WorkerInfo:
        """Who this process is; a reference to the result resolves once the process is up.

        Raises ValueError where the node lacks the interface that `network.interface` names.
        """
        self._place = own_place(self._config.network.interface)
        return WorkerInfo(os.getpid(), self._place, self._device, self._black_box.crash_file, self._gpu)

    def open_door(self) -> int:
        """Listen, so that other nodes can try to connect → the port."""
        self._door, port = open_door(self._place.address)
        return port

    def knock(self, doors: list[tuple[str, int]], timeout_s: float) -> list[str | None]:
        """Try the doors of other nodes → why each failed."""
        return knock(doors, timeout_s)

    def close_door(self) -> None:
        """Nobody will try any more."""
        if self._door is not None:
            self._door.close()

    def gpu_links(self, gpus: list[str]) -> Joined | None:
        """NVLinks between each two of this node's GPUs, by Ray's names of them; None: NVML is not there."""
        return links_between(gpus)

    def collect_crash_report(self, crash_file: CrashFile) -> CrashReport | None:
        """End another process of this node, and read what it left; None when there is nothing."""
        return collect_crash_report(crash_file)

    def assign(self, plan: Plan, rank: int, device: str) -> bytes:
        """Make this process a rank of a plan, in one more epoch → its public key."""
        from actors.remote.rank import Rank

        self._rank_number = rank
        if self._rank is None:
            pin_interface(self._place.interface)
            assignment = Assignment(self._config, plan, rank, self._place.address, device)
            self._rank = Rank(assignment, self._black_box.enter, self.make_runner)
        key: bytes = self._rank.new_key()
        return key

    def make_runner(self, *parts: Any) -> Any:
        """Make the rank's Runner; the parts are its arguments. Others that derive from this make another kind."""
        from actors.tensors.runner import Runner

        return Runner(*parts)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the Rank."""
        return getattr(self._rank, method)(*args)


@dataclass
class _Member:
    actor: Any
    info_ref: Any
    info: WorkerInfo | None = None  # once it is up


class ActorPool:
    """An actor for each rank. The successor of a lost one is on the same node, unless Ray has moved the bundle."""

    def __init__(
        self, config: Config, topology: Topology, placement: PlacementGroup, device: str, actor_class: type[RankActor]
    ) -> None:
        """Create the actors without waiting for them. `device` is cpu or cuda."""
        self._config = config
        self._topology = topology
        self._placement = placement
        self._device = device
        self._actor_class = actor_class
        self._predecessors: dict[int, WorkerInfo] = {}  # by rank; their crash reports are not collected yet
        self._slow_stages: dict[int, str] = {}  # what is to be said of GPUs that no NVLink joins
        self._spares: list[list[_Member]] = [[] for _ in range(topology.pipeline_parallel_size)]
        stages = map(topology.stage, range(topology.num_ranks))
        self._members = [self._create(stage, takes_share=True) for stage in stages]

    @property
    def actors(self) -> list[Any]:
        """The actors, in rank order."""
        return [member.actor for member in self._members]

    @property
    def infos(self) -> list[Any]:
        """References to each WorkerInfo, in rank order."""
        return [member.info_ref for member in self._members]

    def listening(self, ranks: list[int]) -> list[tuple[Place, int]]:
        """Where those of these ranks listen whose processes live, as Ray says, and on which port of Ray's."""
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        found = [actor_table(self._members[rank].actor._actor_id.hex()) for rank in ranks]  # noqa: SLF001 - as above
        lives = [one["Address"] for one in found if one.get("State") == "ALIVE"]
        return [(Place(at["NodeID"], hosts[at["NodeID"]], "", at["IPAddress"]), at["Port"]) for at in lives]

    def num_spares(self) -> list[int]:
        """Processes that wait to take a rank over, by stage. Any thread may ask."""
        return [len(spares) for spares in self._spares]

    def settle_devices(self, infos: list[WorkerInfo], gather: Gather) -> list[str]:
        """Once all processes are up: the device of each rank. A successor on the same node gets its predecessor's.

        New stages are numbered along their NVLinks. Raises ValueError where placement.require_nvlink refuses one.
        """
        new_devices = self._along_links(infos, gather)
        devices = []
        for rank, (member, info) in enumerate(zip(self._members, infos, strict=True)):
            if member.info is None:
                is_successor = self._is_settled(rank, info)
                device = self._predecessors[rank].device if is_successor else new_devices[rank]
                member.info = replace(info, device=device)
            devices.append(member.info.device)
        return devices

    def _along_links(self, infos: list[WorkerInfo], gather: Gather) -> list[str]:
        devices = [info.device for info in infos]
        for stage in range(self._topology.pipeline_parallel_size):
            ranks = self._topology.stage_ranks(stage)
            own, gpus = [infos[rank] for rank in ranks], [infos[rank].gpu for rank in ranks]
            if len(ranks) == 1 or any(self._is_settled(rank, infos[rank]) for rank in ranks):
                continue
            is_required, place = self._config.placement.require_nvlink, str(own[0].place)
            joined: Joined | None = None
            if None not in gpus:
                call = self._members[ranks[0]].actor.gpu_links.remote(gpus)
                joined = gather([call], "looked at its NVLinks", ranks[:1])[0]
            if joined is None and is_required:
                refuse_unknown(stage, place, "ranks have no GPUs" if None in gpus else "NVML does not answer")
            if joined is not None:
                names = [info.device for info in own]
                if words := slow_pairs(stage, names, place, joined, is_required):
                    self._slow_stages[stage] = words
                devices[ranks[0] : ranks[-1] + 1] = along_links(names, joined)
        return devices

    def _is_settled(self, rank: int, info: WorkerInfo) -> bool:
        before = self._members[rank].info or self._predecessors.get(rank)
        return before is not None and before.place.node == info.place.node

    def tell_slow_links(self, gather: Gather) -> None:
        """Once groups have joined: warn of stages that no NVLink joins, with the speed that is measured now."""
        for stage, words in self._slow_stages.items():
            ranks = self._topology.stage_ranks(stage)
            calls = [self.actors[rank].call.remote("exchange_rate") for rank in ranks]
            rate = min(gather(calls, "measured their all-reduces", ranks))
            logger.warning("%s (measured now: all-reduces at %.1f GB/s of bus bandwidth)", words, rate / 1e9)
        self._slow_stages = {}

    def replace(self, rank: int) -> None:
        """End a rank's process, if it still lives, and put a spare in its place, else a new process."""
        member = self._members[rank]
        ray.kill(member.actor)
        if member.info is not None:
            self._predecessors[rank] = member.info
        stage = self._topology.stage(rank)
        spares = self._spares[stage]
        # On CPU a new one reserves nothing of the bundle: Ray frees the share of an ended process seconds later.
        self._members[rank] = spares.pop(0) if spares else self._create(stage, takes_share=self._device == "cuda")

    def collect_crash_report(self) -> dict[int, Any]:
        """Let each successor end its predecessor for good → references to what was left (CrashReport), by rank."""
        collecting = {
            rank: self._members[rank].actor.collect_crash_report.remote(info.crash_file)
            for rank, info in self._predecessors.items()
        }
        self._predecessors = {}
        return collecting

    def fill_spares(self) -> None:
        """Start spares up to the number that the config asks for."""
        for stage, spares in enumerate(self._spares):
            while len(spares) < self._config.recovery.warm_spares:
                spares.append(self._create(stage, takes_share=False))

    def close(self) -> None:
        """End all processes."""
        for member in [*self._members, *(spare for spares in self._spares for spare in spares)]:
            ray.kill(member.actor)
        self._members, self._spares = [], []

    def _create(self, stage: int, takes_share: bool) -> _Member:
        options = actor_options(self._placement, stage, self._device)
        options["num_cpus"] = self._config.placement.cpus_per_rank if takes_share else 0
        if not takes_share:
            options.pop("num_gpus", None)
        actor = ray.remote(self._actor_class).options(**options).remote(self._config)
        return _Member(actor, actor.info.remote())


def actor_options(placement: PlacementGroup, stage: int, device: str) -> dict[str, Any]:
    """Ray's options for an actor in the bundle of a stage: with one of its GPUs on cuda, and with no CPUs."""
    strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=stage)
    options: dict[str, Any] = {"scheduling_strategy": strategy, "max_restarts": 0, "num_cpus": 0}
    if device == "cuda":
        # Each rank sees all GPUs of its node: hiding the others from it breaks NVLink paths (ray#61073).
        variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        options |= {"num_gpus": 1, "runtime_env": {"env_vars": variables}}
    return options
