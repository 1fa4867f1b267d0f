"""The gang on Ray: starts the ranks of one replica, watches them, and rebuilds the gang when one is lost."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table

from actors.decisions.failure.culprit import CrashReport, revise_verdict
from actors.decisions.failure.patience import StepClock
from actors.decisions.model.plan import Plan
from actors.remote.actor_pool import ActorPool, RankActor, WorkerInfo
from actors.remote.channel import EngineChannel
from actors.remote.meeting import Loaded, Meeting, RankInfo, check_substitutions
from actors.remote.reach import Unreachable, check_ranks_reach, check_ray_reaches
from actors.remote.results import end_of_loop, in_words, result_of
from actors.words.errors import GangFailure, GangLost, Verdict
from actors.words.executor import Revival
from cluster.collectives.network import Place, own_place
from cluster.topology import Topology
from configs.config import Config

logger = logging.getLogger(__name__)

_LOOK_S = 1.0  # how often a wait for ranks checks their heartbeats
_PROGRESS_S = 10.0  # how often it logs what it waits for
_FOLLOW_S = 0.5  # so soon after the errors that it causes, a death is known; other errors the rank reports itself
_DRAIN_S = 1.0  # for what a rank has launched to end, where it cannot be aborted
_REACH_S = 6.0  # at a start, nodes try this long to reach each other, and then once more
_STOP_S = 5.0  # ranks get this long to leave by themselves


class Gang:
    """All ranks of one replica. `start` makes them serve, `executor` drives them, `revive` begins another epoch."""

    actor_class = RankActor  # tests replace it with one that fails

    def __init__(
        self, config: Config, topology: Topology, placement: PlacementGroup, device: str, epoch: int = 0
    ) -> None:
        """Create the actors without waiting for them. `device` is cpu or cuda."""
        self.epoch = epoch
        self.num_blocks = 0
        self._config = config
        self._topology = topology
        self._placement = placement
        self._plan: Plan | None = None
        self._is_closing = False
        self._ranks: list[RankInfo] = []
        self._can_abort: list[bool] = []  # by rank; see StageGroup
        self._serving: list[Any] = []  # one reference a rank: resolved when its loop ends
        self._phase_s: dict[str, float] = {}
        self._crash_reports: dict[int, Any] = {}  # by rank, references to what lost processes left
        self._place = own_place(config.network.interface)
        self._pool = ActorPool(config, topology, placement, device, self.actor_class)
        self.num_spares = self._pool.num_spares
        self.executor = self._open_channel(StepClock(config.timeouts.collective_s))

    def start(self, plan: Plan, num_blocks: int | None = None) -> None:
        """Bring the ranks together and wait until all are ready. `num_blocks`: of the KV cache; None: as many as fit.

        Raises GangFailure, and as they are the errors that a user can mend: CheckpointError, UnsupportedModel,
        ValueError.
        """
        self._plan = plan
        try:
            self._assemble(plan, num_blocks, self._config.timeouts.start_s, _REACH_S)
        except BaseException:
            self.close()
            raise

    def revive(self, epoch: int, verdict: Verdict, is_fresh: bool) -> Revival:
        """Begin another epoch: survivors leave the old one and keep their weights, or, if `is_fresh`, all start anew.

        Raises GangFailure; GangLost when processes do not start, or nodes not reach each other, within recovery.wait_s.
        """
        assert self._plan is not None, "revive before start"
        is_fresh = is_fresh or self._config.recovery.mode == "restart_all"
        began = time.monotonic()
        self._phase_s = {"detect": self.executor.clock.stalled_s(began)}
        self.executor.fence()
        dead = self._end_epoch(verdict, is_fresh)
        self.executor.close()
        self.epoch = epoch
        self.executor = self._open_channel(self.executor.clock)
        self._phase_s["fence"] = time.monotonic() - began - self._phase_s["drain"]
        try:
            wait_s = self._config.recovery.wait_s
            self._assemble(self._plan, self.num_blocks, wait_s, wait_s)
        except Unreachable as error:  # it was waited for already, for as long as that takes
            raise GangLost(str(error)) from error
        except ValueError as error:
            raise GangFailure(str(error)) from error
        verdict = self._inquire(verdict, dead)
        logger.info("epoch %d serves; seconds by phase: %s", epoch, self._phase_s)
        return Revival(self.executor, verdict, self._phase_s)

    def ranks(self) -> list[RankInfo]:
        """What `/cluster` shows of each rank. Any thread may call it."""
        now, executor = time.monotonic(), self.executor
        progress_by_rank, seconds = executor.progress_by_rank, executor.seconds
        return [
            replace(
                info,
                heartbeat_age_s=round(now - progress_by_rank[info.rank].heard, 3)
                if info.rank in progress_by_rank
                else None,
                seconds=seconds.get(info.rank, {}),
            )
            for info in self._ranks
        ]

    def ask(self, method: str) -> list[Any]:
        """Call a method of every actor → references, in rank order; ranks that serve answer once they have left."""
        return [getattr(actor, method).remote() for actor in self._pool.actors]

    def give_up(self) -> None:
        """End every wait for ranks. Any thread may call it."""
        self._is_closing = True

    def close(self, patience_s: float = _STOP_S) -> None:
        """Give the ranks `patience_s` to leave by themselves, then end the others. May be called twice.

        Ray ends a stopped process 5 s later; until then its share of the bundle stays reserved.
        """
        self._is_closing = True
        self.executor.close()
        if self._serving:
            ray.wait(self._serving, num_returns=len(self._serving), timeout=patience_s)
            self._monitor.join(patience_s)  # it asks Ray, which may be shut down next
        self._serving = []
        self._pool.close()

    def _open_channel(self, clock: StepClock) -> EngineChannel:
        return EngineChannel(self._place.address, self.epoch, clock, self._topology.tensor_parallel_size)

    def _end_epoch(self, verdict: Verdict, is_fresh: bool) -> dict[int, str]:
        """Replace ranks that are gone or do not leave the old epoch cleanly in time → how each dead one died."""
        gone = set(range(self._topology.num_ranks)) if is_fresh else set[int]()
        if verdict.cause == "silent":
            gone |= set(verdict.ranks)
        for rank in gone:
            self._pool.replace(rank)
        staying = {rank: actor for rank, actor in enumerate(self._pool.actors) if rank not in gone}
        # A rank that cannot be aborted and waits for one that is lost would use up all of clean_s
        draining = {actor.call.remote("drain"): rank for rank, actor in staying.items() if not self._can_abort[rank]}
        parting = {actor.call.remote("part", rank in verdict.ranks): rank for rank, actor in staying.items()}
        clean_s = self._config.recovery.clean_s
        lost = self._phase("drain", lambda: self._replace_lost(draining, min(_DRAIN_S, clean_s)))
        lost |= self._replace_lost({ref: rank for ref, rank in parting.items() if rank not in lost}, clean_s)
        return {rank: words for rank, words in lost.items() if words is not None}

    def _replace_lost(self, calls: dict[Any, int], within_s: float) -> dict[int, str | None]:
        """Replace ranks whose call fails or is late → how each died, in words; None where its process had not."""
        lost: dict[int, str | None] = {}
        deadline, pending = time.monotonic() + within_s, list(calls)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            done, pending = (done, pending) if done else (pending, [])
            for ref in done:
                rank = calls[ref]
                try:
                    ray.get(ref, timeout=0)
                except (RayError, TimeoutError) as error:
                    lost[rank] = in_words(error, rank) if isinstance(error, RayActorError) else None
                    logger.warning("rank %d does not stay: %s", rank, lost[rank] or repr(error).splitlines()[0])
                    self._pool.replace(rank)
        return lost

    def _assemble(self, plan: Plan, num_blocks: int | None, start_s: float, reach_s: float) -> None:
        """Start, join, load and warm up all ranks. Those that survived an epoch have weights and cache already.

        Processes may take `start_s` to start, and nodes that do not reach each other are waited for for `reach_s`.
        """
        config, pool = self._config, self._pool
        infos: list[WorkerInfo] = self._phase("start", lambda: self._gather(pool.infos, "started", start_s))
        devices = pool.settle_devices(infos, lambda calls, what, ranks: self._gather(calls, what, start_s, ranks))
        self._crash_reports = pool.collect_crash_report()
        self._phase("join", lambda: self._join(plan, infos, devices, reach_s))
        bundle_nodes = placement_group_table(self._placement)["bundles_to_node_id"]
        nodes = [bundle_nodes[self._topology.stage(rank)] for rank in range(len(infos))]
        loaded: list[Loaded] = self._phase("load", lambda: self._gather(self._call_all("load"), "loaded the weights"))
        check_substitutions(plan, loaded)
        self.num_blocks = num_blocks or config.cache.num_blocks or self._measured_blocks(nodes)
        plan.fitted(self.num_blocks)  # raises where the longest sequence does not fit
        shapes = self._phase("warm", lambda: self._gather(self._call_all("allocate", self.num_blocks), "warmed up"))
        self.executor.shapes = sorted(set(shapes[0]).intersection(*shapes))
        self._ranks = [
            RankInfo(
                shard.rank, shard.stage, shard.shard, node, info.pid, device, shard.layers, load.weight_bytes, None,
                load_s=load.seconds, fetched_bytes=load.fetched_bytes, substitutions=load.substitutions,
            )
            for shard, node, info, device, load in zip(plan.shards, nodes, infos, devices, loaded, strict=True)
        ]  # fmt: skip
        self._serving = self._call_all("serve")
        watch = (self.executor, self._serving)
        self._monitor = threading.Thread(target=self._watch, args=watch, name="gang-monitor", daemon=True)
        self._monitor.start()
        pool.fill_spares()

    def _join(self, plan: Plan, infos: list[WorkerInfo], devices: list[str], reach_s: float) -> None:
        actors, places = self._pool.actors, [info.place for info in infos]
        check_ranks_reach(self._gather, actors, places, self._place, self.executor.address.port, reach_s)
        parts = [actor.assign.remote(plan, rank, devices[rank]) for rank, actor in enumerate(actors)]
        self.executor.admit(self._gather(parts, "received the plan"))
        port = self._gather([actors[0].call.remote("host_store")], "opened the store")[0]
        meeting = Meeting(self.epoch, places[0].address, port, self.executor.address)
        self._can_abort = self._gather(self._call_all("join", meeting), "joined all groups")
        self.executor.wait_for_ranks(self._config.timeouts.collective_s)
        self._pool.tell_slow_links(lambda calls, what, ranks: self._gather(calls, what, None, ranks))

    def _measured_blocks(self, nodes: list[str]) -> int:
        """The KV blocks for which every rank has room; `nodes` are those of the ranks."""
        ranks_on, actors = Counter(nodes), self._pool.actors
        calls = [
            actor.call.remote("num_blocks_that_fit", ranks_on[node]) for actor, node in zip(actors, nodes, strict=True)
        ]
        num_blocks: list[int] = self._gather(calls, "measured their largest step")
        return min(num_blocks)

    def _inquire(self, verdict: Verdict, dead: dict[int, str]) -> Verdict:
        """Revise the verdict by what lost processes left, which says more than what their neighbors noticed."""
        left: dict[int, CrashReport] = {}
        for rank, ref in self._crash_reports.items():
            if report := result_of(ref, rank):
                left[rank] = report
                if report.text:
                    logger.error("rank %d ended itself in step %d:\n%s", rank, report.step, report.text)
        return revise_verdict(verdict, dead, left)

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        return [actor.call.remote(method, *args) for actor in self._pool.actors]

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = work()
        self._phase_s[name] = time.monotonic() - began
        return result

    def _gather(
        self, refs: list[Any], what: str, within_s: float | None = None, ranks: Sequence[int] | None = None
    ) -> list[Any]:
        """Wait for the results of one call a rank; the first failure ends the wait. `ranks` if these are not the first.

        `what` the ranks have done then, for the log. Raises GangFailure or the rank's own error.
        """
        rank_of = dict(zip(refs, ranks if ranks is not None else range(len(refs)), strict=True))
        started, pending, unheard = time.monotonic(), list(refs), set[tuple[Place, int]]()
        deadline = started + (within_s or self._config.timeouts.start_s)
        logged_at = started
        while pending:
            left_s = deadline - time.monotonic()
            if self._is_closing:
                raise GangLost("the gang is being closed")
            if left_s <= 0:
                missing = [rank_of[ref] for ref in pending]
                raise GangLost(
                    f"ranks {missing} have not {what} in time; look at their logs, or raise timeouts.start_s, or "
                    "recovery.wait_s where a lost node takes longer to come back"
                )
            done, pending = ray.wait(pending, num_returns=1, timeout=min(_LOOK_S, left_s))
            for ref in done:
                result_of(ref, rank_of[ref])
            self.executor.check_loading()
            if not done and time.monotonic() - logged_at > (_LOOK_S if unheard else _PROGRESS_S):
                if not self._ranks:  # later, a node that is lost or cut off may come back
                    listening = self._pool.listening([rank_of[ref] for ref in pending])
                    unheard = check_ray_reaches(listening, self._place, unheard)
                logged_at = time.monotonic()
                logger.info("%d of %d ranks have %s", len(refs) - len(pending), len(refs), what)
        who = "all ranks have" if refs[1:] else f"rank {rank_of[refs[0]]} has"
        logger.info("%s %s (%.1f s)", who, what, time.monotonic() - started)
        return [result_of(ref, rank) for ref, rank in rank_of.items()]

    def _watch(self, executor: EngineChannel, serving: list[Any]) -> None:
        """End the epoch when a rank's loop ends: after a death at once, after an error when no death came with it."""
        pending, ends, is_death = list(serving), list[tuple[str, int]](), False
        while pending and not is_death and not self._is_closing:
            done, pending = ray.wait(pending, num_returns=1, timeout=_FOLLOW_S if ends else None)
            if not done:
                break
            rank = serving.index(done[0])
            is_death, reason = end_of_loop(done[0], rank)
            ends.insert(0 if is_death else len(ends), (reason, rank))
        if not is_death and not self._is_closing:
            time.sleep(_FOLLOW_S)  # the rank reports it itself, with its step
        if not self._is_closing:
            executor.fail(*ends[0], is_death)
