"""Answers a job's rows on gangs over the cluster: a host each, rows in batches, and again where a host is lost."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from actors.tensors.backends.choose import placed_on
from cluster.placement.nodes import read_nodes, wait_for
from cluster.placement.placement import Device, how_many, make_needs, resolve_device, resolve_strategy
from cluster.topology import Topology
from configs.config import Config
from deployments.batch.host import MAX_VAIN, Figures, Turn, start_host
from deployments.batch.order import UNLIMITED
from deployments.batch.progress import Progress
from deployments.batch.rows import Outcome, Row
from deployments.batch.window import Window
from deployments.gangs import check_model, reserved

logger = logging.getLogger(__name__)

_TICK_S = 0.5  # between two looks at the progress
_STOP_S = 7.0  # for hosts to end their ranks


@dataclass
class _Gang:
    """One gang as the driver sees it: its host, and the rows that the host has."""

    number: int
    placement: PlacementGroup
    host: Any = None
    pending: Any = None  # a reference: to the start, or to the turn
    deadline: float = 0.0  # of a start, in monotonic seconds
    is_ready: bool = False
    rows: dict[int, Row] = field(default_factory=dict)
    num_wanted: int = 0
    num_vain: int = 0
    figures: Figures = field(default_factory=Figures)


class GangAnswerer:
    """The Answerer of a batch job. Needs a connection to Ray."""

    def __init__(self, config: Config, now: datetime, progress: Progress, agree: Callable[[int], int]) -> None:
        """`now`: the time that chat templates are told, the same in every run of a job.

        `agree`: from the tokens that a gang's longest request may have to those that it is to have, the same in every
        gang and run. Raises ValueError where the gang has too few.
        """
        self._config = config
        self._now = now
        self._progress = progress
        self._agree = agree
        self._topology = Topology(config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size)
        self._device: Device = "cpu"
        self._gangs: list[_Gang] = []

    def run(self, rows: Iterator[Row]) -> Generator[Outcome, None, None]:
        """See Answerer. Nothing starts where there are no rows."""
        config = self._config
        check_model(config, self._topology)
        self._device = resolve_device(placed_on(config.device), read_nodes())
        num_slots = config.scheduler.max_num_seqs * (num_gangs := self._num_gangs())
        window = Window(rows, num_slots, config.model.max_model_len or UNLIMITED)
        if not window.fill():
            return
        with contextlib.ExitStack() as reservations:
            for number in range(num_gangs):
                placement = reservations.enter_context(reserved(config, self._topology, self._device))
                self._gangs.append(_Gang(number, placement))
            try:
                for gang in self._gangs:
                    self._start(gang)
                while window.fill():
                    yield from self._round(window)
            finally:
                self._stop()
        self._progress.show([], is_last=True)

    def _num_gangs(self) -> int:
        """How many gangs fit, or as many as asked for. Raises ValueError where the cluster has no room for them."""
        config, asked = self._config, self._config.batch.gangs
        needs = make_needs(self._topology, config.placement, self._device)
        strategy = resolve_strategy(config.placement, self._topology)
        wait_for(needs, strategy, config.placement.wait_s)
        found = how_many(needs, strategy, read_nodes(), asked)
        if asked is not None and found < asked:
            raise ValueError(f"batch.gangs: {asked}, but the cluster has room for {found}; ask for that many, or fewer")
        return max(1, found)

    def _round(self, window: Window) -> Iterator[Outcome]:
        """Send rows to the gangs that are due, and wait for one of them → what it has answered."""
        for gang in self._gangs:
            if gang.is_ready and gang.pending is None:
                self._send(gang, window)
        by_ref = {gang.pending: gang for gang in self._gangs}
        done, _ = ray.wait(list(by_ref), num_returns=1, timeout=_TICK_S)
        for ref in done:
            yield from self._take(by_ref[ref], ref, window)
        for gang in list(self._gangs):
            if not gang.is_ready and time.monotonic() > gang.deadline:
                self._lose(gang, window, "it has not started in time; raise timeouts.start_s")
        self._progress.show([gang.figures for gang in self._gangs])

    def _send(self, gang: _Gang, window: Window) -> None:
        rows = window.take(gang.number, gang.num_wanted)
        gang.rows.update((row.number, row) for row in rows)
        gang.pending = gang.host.turn.remote(rows, window.num_waiting > 0)

    def _take(self, gang: _Gang, ref: Any, window: Window) -> Iterator[Outcome]:
        """What a start or a turn has brought. A host that is gone is replaced, and its rows wait again."""
        try:
            turn: Turn | int = ray.get(ref)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ValueError) and not any(one.is_ready for one in self._gangs):
                raise cause from None  # the user can mend it
            self._lose(gang, window, str(cause or error).strip().partition("\n")[0])
            return
        gang.pending = None
        if isinstance(turn, int):  # it has started
            if (longest := self._agree(turn)) < turn:
                gang.pending = gang.host.limit.remote(longest)
                return
            gang.is_ready, gang.num_wanted = True, self._config.scheduler.max_num_seqs
            return
        gang.num_wanted, gang.figures = turn.num_wanted, turn.figures
        if turn.outcomes:
            gang.num_vain = 0
        for outcome in turn.outcomes:
            del gang.rows[outcome.number]
            window.answered(outcome.number, len(outcome.body))
            yield outcome

    def _start(self, gang: _Gang) -> None:
        """Start a host. It waits where the gang's bundles have lost their node, as long as recovery would."""
        config = self._config
        gang.host = start_host(config, gang.placement)
        gang.is_ready, gang.figures = False, Figures()
        gang.deadline = time.monotonic() + config.recovery.wait_s + 2 * config.timeouts.start_s
        gang.pending = gang.host.start.remote(config, self._device, gang.placement, gang.number, self._now)

    def _lose(self, gang: _Gang, window: Window, reason: str) -> None:
        """A host is gone: its rows wait again, and another one starts. Raises ValueError when no gang is left."""
        logger.error("gang %d is lost: %s", gang.number, reason)
        window.give_back(gang.number, gang.rows.values())
        gang.rows = {}
        gang.num_vain += 1
        self._progress.bury(gang.figures)
        ray.kill(gang.host)  # its ranks end with it
        if gang.num_vain < MAX_VAIN:
            self._start(gang)
            return
        self._gangs.remove(gang)
        if not self._gangs:
            raise ValueError(
                f"gang {gang.number} ended {MAX_VAIN} times without having answered a row: {reason}; look at the log "
                "of its host, mend what is wrong, and start the same command again: it goes on"
            )

    def _stop(self) -> None:
        stopping = [gang.host.stop.remote() for gang in self._gangs if gang.host is not None]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_S)
        for gang in self._gangs:
            self._progress.bury(gang.figures)
            if gang.host is not None:
                ray.kill(gang.host)
        self._gangs = []
