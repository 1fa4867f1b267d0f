"""The gang on Ray: starts the rank actors of one replica, brings them together, watches over them, ends them."""

import dataclasses
import logging
import os
import sys
import threading
import time
from collections import Counter
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.decisions.plan import Plan
from actors.remote.channel import EngineChannel
from actors.remote.meeting import Assignment, Loaded, Meeting, RankInfo
from actors.words.errors import GangFailure
from cluster.devices import own_cuda_index
from cluster.topology import Topology
from configs.config import Config

logger = logging.getLogger(__name__)

_LOOK_S = 1.0  # while it waits for ranks, it looks whether all are heard this often
_PROGRESS_S = 10.0  # say what is waited for this often
_FOLLOW_S = 0.5  # a death shows this soon after the errors that it causes; an error without one is told by its rank
_STOP_S = 5.0  # ranks get this long to leave by themselves


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a rank's process says of itself once it is up."""

    pid: int
    address: str  # of its node
    device: str  # cpu, or cuda:<index>


class RankActor:
    """The thin Ray shell around a Rank. It imports torch in all ranks at once, while the replica makes the plan."""

    def __init__(self, rank: int, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
        import actors.remote.rank  # noqa: F401

        self._rank_number = rank
        self._config = config
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        device = f"cuda:{own_cuda_index(gpus[0])}" if gpus else "cpu"
        self._hello = Hello(os.getpid(), ray.util.get_node_ip_address(), device)

    def hello(self) -> Hello:
        """Returns once the process is up."""
        return self._hello

    def assign(self, plan: Plan) -> bytes:
        """Become the rank of a plan; returns its public key."""
        from actors.remote.rank import Rank

        config = self._config
        self._rank = Rank(
            Assignment(
                plan=plan,
                rank=self._rank_number,
                source=config.model.source,
                revision=config.model.revision,
                address=self._hello.address,
                device=self._hello.device,
                timeout_s=config.timeouts.collective_s,
            )
        )
        return self._rank.public_key()

    def call(self, method: str, *args: Any) -> Any:
        """A method of the Rank."""
        return getattr(self._rank, method)(*args)


class Gang:
    """All ranks of one replica. `start` makes them serve, `executor` drives them, `close` ends them."""

    actor_class = RankActor  # a test puts one in that fails

    def __init__(
        self, config: Config, topology: Topology, placement: PlacementGroup, device: str, epoch: int = 0
    ) -> None:
        """Ask for the actors and return at once: they start while the caller goes on. `device` is cpu or cuda."""
        self.epoch = epoch
        self.num_blocks = 0
        self._config = config
        self._topology = topology
        self._placement = placement
        self._deadline = time.monotonic() + config.timeouts.start_s
        self._is_closing = False
        self._ranks: list[RankInfo] = []
        self._serving: list[Any] = []  # one reference a rank: resolved when its loop ends
        self._actors = [self._create(rank, device) for rank in range(topology.num_ranks)]
        self.executor = EngineChannel(ray.util.get_node_ip_address(), epoch, config.timeouts.collective_s)

    def start(self, plan: Plan, num_blocks: int | None = None) -> None:
        """Bring the ranks together and wait until every one is ready. `num_blocks`: as an earlier epoch had, or chosen.

        Raises GangFailure, and as they are the errors that a user can mend: CheckpointError, UnsupportedModel,
        ValueError.
        """
        try:
            self._assemble(plan, num_blocks)
        except BaseException:
            self.close()
            raise
        self._serving = self._call_all("serve")
        threading.Thread(target=self._watch, name="gang-monitor", daemon=True).start()

    def ranks(self) -> list[RankInfo]:
        """The ranks as they stand now. Any thread."""
        now, heard = time.monotonic(), self.executor.last_heartbeat
        return [
            dataclasses.replace(
                info,
                heartbeat_age_s=round(now - heard[info.rank][0], 3),
                seconds=self.executor.seconds.get(info.rank, {}),
            )
            for info in self._ranks
        ]

    def close(self, patience_s: float = _STOP_S) -> None:
        """Let the ranks leave by themselves for `patience_s`, then end those that do not. May be called twice.

        A stopped process is ended by Ray 5 s later; until then its share of the bundle stays taken.
        """
        self._is_closing = True
        self.executor.close()
        if self._serving and self._actors:
            ray.wait(self._serving, num_returns=len(self._serving), timeout=patience_s)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _create(self, rank: int, device: str) -> Any:
        options: dict[str, Any] = {"num_cpus": self._config.placement.cpus_per_rank, "max_restarts": 0}
        if device == "cuda":
            # Each rank sees all GPUs of its node: hiding the others from it breaks NVLink paths (ray#61073).
            variables = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            options |= {"num_gpus": 1, "runtime_env": {"env_vars": variables}}
        bundle = self._topology.stage(rank)
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=bundle)
        return ray.remote(self.actor_class).options(scheduling_strategy=strategy, **options).remote(rank, self._config)

    def _assemble(self, plan: Plan, num_blocks: int | None) -> None:
        config, actors = self._config, self._actors
        hellos: list[Hello] = self._gather([actor.hello.remote() for actor in actors], "started")
        keys = self._gather([actor.assign.remote(plan) for actor in actors], "taken their part of the plan")
        self.executor.admit(keys)
        port = self._gather([actors[0].call.remote("host_store")], "opened the store")[0]
        meeting = Meeting(self.epoch, hellos[0].address, port, self.executor.address)
        self._gather(self._call_all("join", meeting), "joined their groups")
        self.executor.wait_for_ranks(config.timeouts.collective_s)
        bundle_nodes = placement_group_table(self._placement)["bundles_to_node_id"]
        nodes = [bundle_nodes[self._topology.stage(rank)] for rank in range(len(actors))]
        ranks_on = Counter(nodes)
        share = config.cache.memory_share
        loads = [actor.call.remote("load", share, ranks_on[node]) for actor, node in zip(actors, nodes, strict=True)]
        loaded: list[Loaded] = self._gather(loads, "loaded their weights")
        self.num_blocks = num_blocks or _num_blocks(config, plan, loaded)
        self._gather(self._call_all("allocate", self.num_blocks), "warmed up")
        self._ranks = [
            RankInfo(
                shard.rank,
                shard.stage,
                shard.shard,
                node,
                hello.pid,
                hello.device,
                shard.layers,
                load.weight_bytes,
                0.0,
            )
            for shard, node, hello, load in zip(plan.shards, nodes, hellos, loaded, strict=True)
        ]

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        return [actor.call.remote(method, *args) for actor in self._actors]

    def _gather(self, refs: list[Any], what: str) -> list[Any]:
        """Results of one call a rank; the first that fails ends the wait. Raises GangFailure or the rank's error."""
        started, pending = time.monotonic(), list(refs)
        told = started
        while pending:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                missing = [refs.index(ref) for ref in pending]
                raise GangFailure(
                    f"ranks {missing} have not {what} in time; look at their logs, or raise timeouts.start_s"
                )
            done, pending = ray.wait(pending, num_returns=1, timeout=min(_LOOK_S, left_s))
            for ref in done:
                _result(ref, refs.index(ref))
            self.executor.check_loading()
            if not done and time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                logger.info("%d of %d ranks have %s", len(refs) - len(pending), len(refs), what)
        logger.info("%s %s (%.1f s)", "all ranks have" if refs[1:] else "rank 0 has", what, time.monotonic() - started)
        return [_result(ref, rank) for rank, ref in enumerate(refs)]

    def _watch(self) -> None:
        """The end of a rank's loop ends the gang. A death is said at once; what only followed from one waits for it."""
        pending, reasons, is_death = list(self._serving), list[str](), False
        while pending and not is_death and not self._is_closing:
            done, pending = ray.wait(pending, num_returns=1, timeout=_FOLLOW_S if reasons else None)
            if not done:
                break
            is_death, reason = _end_of_loop(done[0], self._serving.index(done[0]))
            reasons.insert(0 if is_death else len(reasons), reason)
        if not is_death:
            time.sleep(_FOLLOW_S)  # its rank tells it first, and better
        if not self._is_closing:
            self.executor.fail(reasons[0])


def _result(ref: Any, rank: int) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError):
            raise cause from None  # the user can mend it: say it in the rank's own words
        raise GangFailure(_in_words(error, rank)) from error


def _end_of_loop(ref: Any, rank: int) -> tuple[bool, str]:
    """Whether the rank's process died, and the end in words."""
    try:
        ray.get(ref)
    except RayError as error:
        return isinstance(error, RayActorError), _in_words(error, rank)
    return False, f"rank {rank} left its loop"


def _in_words(error: RayError, rank: int) -> str:
    if isinstance(error, RayActorError):
        return f"rank {rank} died: {str(error).partition(chr(10))[0]}"
    cause = getattr(error, "cause", None)
    return f"rank {rank} failed: {type(cause).__name__}: {cause}" if cause else f"rank {rank} failed: {error}"


def _num_blocks(config: Config, plan: Plan, loaded: list[Loaded]) -> int:
    num_blocks = config.cache.num_blocks or min(load.num_blocks_that_fit for load in loaded)
    plan.check_num_blocks(num_blocks)
    return num_blocks
