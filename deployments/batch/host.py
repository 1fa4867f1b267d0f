"""Answers rows on one gang: reads and encodes them ahead, lets in what the KV cache holds, gives whole answers back.

Rows are answered by what HTTP requests are answered by: the Service, its Generation and the replies. What differs is
that nobody waits for a token: nothing wakes up before an answer has ended.
"""

import asyncio
import dataclasses
import logging
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.decisions.schedule.kv_admission import KVAdmission
from configs.config import Config
from deployments.api.errors import ApiError, internal_error, log_unexpected
from deployments.api.generation import Generation
from deployments.api.responses import reply_to
from deployments.batch.rows import Outcome, Row
from deployments.hosting import GangHost

if TYPE_CHECKING:  # it imports Transformers, which is to happen while the ranks' processes start
    from deployments.api.service import Service

logger = logging.getLogger(__name__)

MAX_VAIN = 3  # hosts of a gang that end in a row without having answered anything; then the gang is given up
_GATHER_S = 0.1  # a turn with outcomes takes so long: a message to the driver costs a millisecond on both sides
_REPORT_S = 1.0  # a turn without outcomes ends after so long, and tells how it goes
_MAX_AHEAD_BYTES = 8 * 1024 * 1024  # of rows' input, waiting for room in the cache


@dataclass
class Figures:
    """What one host has counted since it started, and how it is now."""

    state: str = "starting"
    num_prompt: int = 0  # tokens of prompts that have begun to run
    num_cached: int = 0  # those of them that were found in the prefix cache
    num_generated: int = 0  # tokens
    num_rebuilds: int = 0  # epochs that ended with a failure
    num_preemptions: int = 0
    running: int = 0  # sequences
    waiting: int = 0
    kv_usage: float = 0.0  # share of the blocks that live sequences hold


class Turn(NamedTuple):
    """What a host gives back: outcomes, and how many more rows it could use."""

    outcomes: list[Outcome]
    num_wanted: int
    figures: Figures


@dataclass
class _Prepared:
    """A row in token ids, which waits for room in the cache."""

    row: Row
    generation: Generation


class RowAnswerer:
    """Answers rows with a Service. Used on one event loop."""

    def __init__(self, service: "Service", admission: KVAdmission, max_ahead: int) -> None:
        """`max_ahead`: rows that may wait for room in the cache, encoded or about to be."""
        self._service = service
        self._admission = admission
        self._max_ahead = max_ahead
        self._rows: deque[Row] = deque()
        self._num_bytes = 0  # of rows that wait
        self._prepared: deque[_Prepared] = deque()
        self._outcomes: list[Outcome] = []
        self._running: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()  # outcomes have come, rows are wanted, or the gang is lost
        self._has_rows = asyncio.Event()
        self._preparing: asyncio.Task[None] | None = None
        self._is_lost = False

    def add(self, rows: list[Row]) -> None:
        """Take rows; their outcomes come with a later `turn`."""
        self._preparing = self._preparing or asyncio.create_task(self._prepare_all())
        self._rows.extend(rows)
        self._num_bytes += sum(row.num_bytes for row in rows)
        if rows:
            self._has_rows.set()

    async def turn(self, rows: list[Row], has_more: bool) -> Turn:
        """Take rows, and wait until there is something to say: outcomes, or that more rows are wanted.

        `has_more`: there are rows that could be sent. Raises RuntimeError when the gang is lost: rows without an
        outcome are to be sent to another one.
        """
        self.add(rows)
        await self._wait(has_more)
        outcomes, self._outcomes = self._outcomes, []
        if self._is_lost and not outcomes:
            raise RuntimeError(f"the gang is lost: {self._service.engine.failure}")
        return Turn(outcomes, self._num_wanted, figures_of(self._service))

    async def close(self) -> None:
        """End what runs."""
        tasks = [*self._running, *([self._preparing] if self._preparing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _num_wanted(self) -> int:
        if self._num_bytes > _MAX_AHEAD_BYTES or self._is_lost:
            return 0
        return max(0, self._max_ahead - len(self._rows) - len(self._prepared))

    @property
    def _is_low(self) -> bool:
        """Whether it is time to ask for rows: half of those that may wait are left."""
        return self._num_wanted > self._max_ahead // 2

    async def _wait(self, has_more: bool) -> None:
        """Until a turn is to end."""
        began = time.monotonic()
        while not self._is_lost and not (has_more and self._is_low):
            left_s = began + (_GATHER_S if self._outcomes else _REPORT_S) - time.monotonic()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                return

    async def _prepare_all(self) -> None:
        """Check and encode rows in the order in which they came, and let them in."""
        while True:
            while not self._rows:
                self._has_rows.clear()
                await self._has_rows.wait()
            row = self._rows.popleft()
            try:
                self._service.check_body(row.body)
                self._prepared.append(_Prepared(row, await self._service.prepare(row.body, None)))
            except ApiError as error:
                self._end(row, error.status, error.body())
                self._num_bytes -= row.num_bytes
            except Exception as error:  # noqa: BLE001 - a fault in one row ends that row only
                log_unexpected(error)
                self._end(row, internal_error().status, internal_error().body())
                self._num_bytes -= row.num_bytes
            self._let_in()
            await asyncio.sleep(0)  # answers that have ended go first

    def _let_in(self) -> None:
        """Start the rows at the head of the queue that the cache has room for."""
        while self._prepared and not self._is_lost:
            prepared = self._prepared[0]
            ticket = self._admission.admit(prepared.generation.requests)
            if ticket is None:
                return
            self._prepared.popleft()
            self._num_bytes -= prepared.row.num_bytes
            task = asyncio.create_task(self._answer(prepared.row, prepared.generation, ticket))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _answer(self, row: Row, generation: Generation, ticket: int) -> None:
        try:
            is_single_call = getattr(row.body, "parallel_tool_calls", None) is False  # the engine knows of neither
            generation.start(at_end=not (row.body.stop or is_single_call))
            answers = await generation.whole()
            reply = reply_to(row.body, self._service.text.token_texts, row.stamp)
            self._end(row, 200, reply.whole(answers, generation.usage))
            limit = sum(request.max_tokens for request in generation.requests)
            self._admission.forecast.observe(generation.usage.completion_tokens, limit)
        except ApiError as error:
            if error.status == 503:  # not the row's fault
                self._is_lost = True
                self._changed.set()
            else:
                self._end(row, error.status, error.body())
        except Exception as error:  # noqa: BLE001 - a fault in one row ends that row only
            log_unexpected(error)
            self._end(row, internal_error().status, internal_error().body())
        finally:
            generation.end()
            self._admission.end(ticket)
            self._let_in()
            if self._is_low:
                self._changed.set()

    def _end(self, row: Row, status: int, body: bytes) -> None:
        self._outcomes.append(Outcome(row.number, status, body))
        self._changed.set()


def figures_of(service: "Service") -> Figures:
    """What a service's engine has counted."""
    snapshot, stats = service.engine.snapshot(), service.engine.stats
    return Figures(
        state=snapshot.state,
        num_prompt=stats.num_prompt,
        num_cached=stats.num_prompt_cached,
        num_generated=stats.num_generated,
        num_rebuilds=sum(stats.num_rebuilds.values()),
        num_preemptions=stats.num_preemptions,
        running=snapshot.running,
        waiting=snapshot.waiting,
        kv_usage=snapshot.blocks_used / snapshot.blocks_total,
    )


def answerer_on(host: GangHost) -> RowAnswerer:
    """A RowAnswerer that keeps the gang of a host busy."""
    max_num_seqs = host.plan.scheduler.max_num_seqs
    return RowAnswerer(host.service, KVAdmission(host.num_blocks, host.plan.block_size, max_num_seqs), max_num_seqs)


class HostActor:
    """The Ray actor that hosts one gang of a batch job."""

    def __init__(self) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
        self._host: GangHost | None = None
        self._answerer: RowAnswerer | None = None

    async def start(
        self, config: Config, device: str, placement: PlacementGroup, number: int, now: datetime | None
    ) -> int:
        """Start the gang → the tokens that its longest request may have. Raises what a GangHost raises.

        `number`: of the gang, from 0; `now`: the time that chat templates are told; None: that of each conversation.
        """
        self._host = await asyncio.to_thread(GangHost, config, device, placement, f"gang {number}", now)
        self._answerer = answerer_on(self._host)
        if config.batch.metrics_port is not None:
            self._listen(config.batch.metrics_port + number, number)
        return self._host.service.limits.max_model_len

    async def limit(self, max_model_len: int) -> int:
        """Take no longer requests than other gangs do → the limit, in tokens."""
        assert self._host is not None, "limit before start"
        service = self._host.service
        service.limits = dataclasses.replace(service.limits, max_model_len=max_model_len)
        return max_model_len

    def _listen(self, port: int, number: int) -> None:
        """Answer /metrics; where the port is taken, the gang works without."""
        assert self._host is not None, "listen before start"
        address = ray.util.get_node_ip_address()
        try:
            self._host.service.metrics.listen(address, port)
        except OSError as error:
            logger.warning(
                "batch.metrics_port: gang %d has no /metrics on port %d: %s; set another", number, port, error
            )
            return
        logger.info("gang %d: http://%s:%d/metrics", number, address, port)

    async def add(self, rows: list[Row]) -> None:
        """See RowAnswerer."""
        assert self._answerer is not None, "add before start"
        self._answerer.add(rows)

    async def turn(self, rows: list[Row], has_more: bool) -> Turn:
        """See RowAnswerer."""
        assert self._answerer is not None, "turn before start"
        return await self._answerer.turn(rows, has_more)

    async def stop(self) -> None:
        """End requests, engine and gang."""
        if self._answerer is not None:
            await self._answerer.close()
        if self._host is not None:
            await asyncio.to_thread(self._host.close)


def start_host(config: Config, placement: PlacementGroup) -> Any:
    """A HostActor beside the first stage of the gang that it will start."""
    strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=0)
    options = {"num_cpus": config.placement.cpus_per_replica, "max_restarts": 0, "scheduling_strategy": strategy}
    return ray.remote(HostActor).options(**options).remote()
