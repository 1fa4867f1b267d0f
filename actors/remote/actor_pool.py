"""The processes of a gang on Ray: one actor a rank, spares that wait to take a rank over, and who follows whom."""

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.decisions.failure.culprit import CrashReport
from actors.decisions.model.plan import Plan
from actors.remote.black_box import BlackBox, CrashFile, collect_crash_report
from actors.remote.imports import collector_paused, compiler_left_out
from actors.remote.meeting import Assignment
from cluster.placement.devices import own_cuda_index
from cluster.topology import Topology
from configs.config import Config


@dataclass(frozen=True)
class WorkerInfo:
    """What a rank's process says of itself once it is up."""

    pid: int
    address: str  # of its node
    device: str  # cpu, or cuda:<index>
    crash_file: CrashFile


class RankActor:
    """The thin Ray shell around a Rank. It imports torch in all ranks at once, while the replica makes the plan."""

    def __init__(self, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
        with collector_paused(), compiler_left_out():
            import actors.remote.rank  # noqa: F401

        self._config = config
        self._rank: Any = None
        self._rank_number = -1
        self._black_box = BlackBox()
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        device = f"cuda:{own_cuda_index(gpus[0])}" if gpus else "cpu"
        self._hello = WorkerInfo(os.getpid(), ray.util.get_node_ip_address(), device, self._black_box.crash_file)

    def info(self) -> WorkerInfo:
        """Returns once the process is up."""
        return self._hello

    def collect_crash_report(self, crash_file: CrashFile) -> CrashReport | None:
        """End a process of this node, and read what it left; None when there is nothing."""
        return collect_crash_report(crash_file)

    def assign(self, plan: Plan, rank: int, device: str) -> bytes:
        """Be a rank of a plan, in one more epoch; returns its public key."""
        from actors.remote.rank import Rank

        self._rank_number = rank
        if self._rank is None:
            assignment = Assignment(self._config, plan, rank, self._hello.address, device)
            self._rank = Rank(assignment, self._black_box.enter)
        key: bytes = self._rank.new_key()
        return key

    def call(self, method: str, *args: Any) -> Any:
        """A method of the Rank."""
        return getattr(self._rank, method)(*args)


@dataclass
class _Member:
    actor: Any
    info: Any  # reference
    said: WorkerInfo | None = None


class ActorPool:
    """A member for each rank; whoever follows another is on the same node, unless Ray has moved the bundle."""

    def __init__(
        self, config: Config, topology: Topology, placement: PlacementGroup, device: str, actor_class: type[RankActor]
    ) -> None:
        """Asks for the actors and returns at once. `device` is cpu or cuda."""
        self._config = config
        self._topology = topology
        self._placement = placement
        self._device = device
        self._actor_class = actor_class
        self._predecessors: dict[int, WorkerInfo] = {}  # by rank, of those that are not collecting yet
        self._spares: list[list[_Member]] = [[] for _ in range(topology.pipeline_parallel_size)]
        stages = map(topology.stage, range(topology.num_ranks))
        self._members = [self._create(stage, takes_share=True) for stage in stages]

    @property
    def actors(self) -> list[Any]:
        """By rank."""
        return [member.actor for member in self._members]

    @property
    def infos(self) -> list[Any]:
        """References, by rank."""
        return [member.info for member in self._members]

    def heard(self, infos: list[WorkerInfo]) -> list[str]:
        """All processes are up → the device of each: whoever follows another on its node takes its device over."""
        devices = []
        for rank, (member, info) in enumerate(zip(self._members, infos, strict=True)):
            if member.said is None:
                before = self._predecessors.get(rank)
                is_successor = before is not None and before.address == info.address
                device = before.device if before is not None and is_successor else info.device
                member.said = WorkerInfo(info.pid, info.address, device, info.crash_file)
            devices.append(member.said.device)
        return devices

    def replace(self, rank: int) -> None:
        """End a rank's process, if it still lives, and let a spare follow it, or else another one that starts."""
        member = self._members[rank]
        ray.kill(member.actor)
        if member.said is not None:
            self._predecessors[rank] = member.said
        stage = self._topology.stage(rank)
        spares = self._spares[stage]
        # On CPU it takes no share of the bundle: that of a stopped process is given back seconds later.
        self._members[rank] = spares.pop(0) if spares else self._create(stage, takes_share=self._device == "cuda")

    def collect_crash_report(self) -> dict[int, Any]:
        """Let those that follow see to it that those before them are gone → references to CrashReport, by rank."""
        collecting = {
            rank: self._members[rank].actor.collect_crash_report.remote(info.crash_file)
            for rank, info in self._predecessors.items()
        }
        self._predecessors = {}
        return collecting

    def fill_spares(self) -> None:
        """Start as many as the config asks for."""
        for stage, spares in enumerate(self._spares):
            while len(spares) < self._config.recovery.warm_spares:
                spares.append(self._create(stage, takes_share=False))

    def close(self) -> None:
        """End all."""
        for member in [*self._members, *(spare for spares in self._spares for spare in spares)]:
            ray.kill(member.actor)
        self._members, self._spares = [], []

    def _create(self, stage: int, takes_share: bool) -> _Member:
        options: dict[str, Any] = {"num_cpus": self._config.placement.cpus_per_rank if takes_share else 0}
        if self._device == "cuda":
            # Each rank sees all GPUs of its node: hiding the others from it breaks NVLink paths (ray#61073).
            variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            options |= {"num_gpus": int(takes_share), "runtime_env": {"env_vars": variables}}
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=stage)
        actor = (
            ray.remote(self._actor_class)
            .options(scheduling_strategy=strategy, max_restarts=0, **options)
            .remote(self._config)
        )
        return _Member(actor, actor.info.remote())
