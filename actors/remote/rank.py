"""One rank of a gang: joins its groups, loads its slices of the weights, and executes steps in the channel's order.

When an epoch ends it gives up groups and channel, and keeps weights and cache for the next epoch.
"""

import faulthandler
import gc
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from actors.decisions.model.plan import Plan
from actors.remote.channel import KeyPair
from actors.remote.meeting import Assignment, Loaded, Meeting
from actors.remote.rank_channel import RankChannel
from actors.tensors.backend import Backend
from actors.tensors.backends.choose import make_backend
from actors.tensors.launched import Launched
from actors.tensors.measure import num_blocks_that_fit
from actors.tensors.runner import Runner
from actors.tensors.weights.source import resolve_source
from actors.words.messages import Bucket, Capture, Captured, Check, Shutdown, StepBatch, StepResult, ToRank
from cluster.collectives.groups import Groups, join
from cluster.collectives.rendezvous import JoinCancelled, host_store, join_store
from cluster.collectives.speed import exchange_rate

logger = logging.getLogger(__name__)

_PROGRESS_S = 2.0
_LOOK_S = 50e-6  # how often a rank whose steps are under way looks for a message, and for their ends


class Rank:
    """Owns the model part, KV cache and groups of one (stage, shard). A plain class; an actor wraps it."""

    def __init__(
        self,
        assignment: Assignment,
        enter_step: Callable[[int], None] = lambda step: None,
        make_runner: Callable[[Plan, int, Groups, Backend], Runner] = Runner,
    ) -> None:
        """`enter_step` is called with each step that begins, and with -1 when it has ended."""
        self.assignment = assignment
        self._make_runner = make_runner
        self._enter_step = enter_step
        self._keys = KeyPair.make()
        self._is_over = threading.Event()  # the epoch that this rank is in, or on its way into
        self._loaded: Loaded | None = None
        self._device = torch.device(assignment.device)
        self._backend = make_backend(assignment.config.device, self._device)
        self._backend.set_up()
        self._groups: Groups | None = None
        self._num_uncounted = 0  # operations of captures: they may differ between shards where one fails
        self._runner: Runner | None = None
        self._channel: RankChannel | None = None

    def new_key(self) -> bytes:
        """Make a key pair for the next epoch → the public key, by which the engine knows this process."""
        self._keys = KeyPair.make()
        return self._keys.public

    def host_store(self) -> int:
        """Rank 0 only: serve the rendezvous store of the next epoch → its port."""
        self._store, port = host_store(self.assignment.address)
        return port

    def join(self, meeting: Meeting) -> bool:
        """Join an epoch: step channel, store, and groups, warmed up. Raises TimeoutError or JoinCancelled.

        Returns whether what this rank may wait for in its stage can be aborted.
        """
        this, started = self.assignment, time.monotonic()
        timeout_s = this.config.timeouts.collective_s
        self._is_over, self._num_uncounted = threading.Event(), 0
        self._channel = RankChannel(
            meeting.channel, self._keys, this.rank, meeting.epoch, self._end_epoch, self._num_operations
        )
        store = join_store(meeting.store_address, meeting.store_port, meeting.epoch, timeout_s, self._is_over)
        self._groups = join(this.plan.topology, this.rank, store, self._device, this.address, timeout_s)
        if self._is_over.is_set():  # before there were groups that could be aborted
            raise JoinCancelled(f"epoch {meeting.epoch} was given up")
        if self._runner is not None:
            self._runner.join(self._groups)
        self._say("joined its groups in %.1f s", time.monotonic() - started)
        return self._groups.stage.can_abort

    def exchange_rate(self) -> float:
        """Bus bandwidth of its stage in bytes a second; all shards measure together."""
        assert self._groups is not None, "measure after join"
        return exchange_rate(self._groups.stage, self._device)

    def drain(self) -> None:
        """Return once the device has done all that was launched; never, where it waits for a rank that is gone.

        Raises when it does not answer: a CUDA error stays with its process, so that the small sum fails too.
        """
        torch.ones(1, device=self._device).sum().item()

    def part(self, is_culprit: bool) -> None:
        """Leave the epoch, and check that this rank can join another; a culprit's weights too. Raises if it cannot."""
        self._release_graphs()
        if self._channel is not None:
            self._channel.close()
        if self._groups is not None:
            self._groups.abort()
            self._groups.close()
        self._channel = self._groups = None
        if self._runner is not None:
            self._runner.part()
            self.drain()
            if is_culprit:
                self._runner.check_weights()

    def load(self) -> Loaded:
        """Read this rank's slices of the weights, once. Raises CheckpointError, UnsupportedModel."""
        assert self._groups is not None, "load before join"
        if self._loaded is not None:
            return self._loaded
        this = self.assignment
        self._runner = self._make_runner(this.plan, this.rank, self._groups, self._backend)
        folder = resolve_source(this.config.model, this.plan.spec.revision)
        report = self._runner.load(folder, self._progress(), this.config.substitutions == "auto")
        fetched = f"; fetched {report.fetched_bytes / 1e6:.1f} MB" if report.fetched_bytes else ""
        self._say("loaded %.1f MB in %.1f s%s", report.bytes_copied / 1e6, report.seconds, fetched)
        substitutions = self._runner.substitutions
        for one in substitutions:
            why_not = f"; not {'everywhere' if one.count else 'used'}: {one.reason_not}" if one.reason_not else ""
            self._say("%s: substituted %d times%s", one.what, one.count, why_not)
        weight_bytes = this.plan.shards[this.rank].weight_bytes
        self._loaded = Loaded(weight_bytes, report.seconds, substitutions, report.fetched_bytes)
        return self._loaded

    def num_blocks_that_fit(self, ranks_on_node: int) -> int:
        """Run the largest step, together with all ranks → the KV blocks for which there is room then."""
        assert self._runner is not None, "load comes first"
        started = time.monotonic()
        num_blocks = num_blocks_that_fit(self._runner, self.assignment.config.cache.memory_share, ranks_on_node)
        self._say("has room for %d KV blocks, measured in %.1f s", num_blocks, time.monotonic() - started)
        return num_blocks

    def allocate(self, num_blocks: int) -> tuple[Bucket, ...]:
        """Make the KV cache and run two steps → the shapes of steps that this rank can capture in graphs."""
        assert self._runner is not None, "allocate before load"
        if self._runner.num_blocks != num_blocks:
            self._runner.allocate_cache(num_blocks)
        self._runner.warm_up()
        gc.collect()
        gc.freeze()  # what exists now stays: collecting it again would delay a step on all ranks
        self._say("ready: %d KV blocks", num_blocks)
        return self._runner.shapes

    def serve(self) -> str | None:
        """Execute steps until the engine sends Shutdown → None, or the error that ended it, which was reported."""
        assert self._runner is not None and self._channel is not None and self._groups is not None, "serve before load"
        clock, launched = self._runner.clock, deque[tuple[StepBatch, Launched]]()
        self._channel.seconds = clock.seconds
        try:
            while not isinstance(message := self._next(launched), Shutdown):
                if isinstance(message, Check):
                    self._runner.check_weights()
                if isinstance(message, Capture):
                    self._capture(message, launched)
                if not isinstance(message, StepBatch):
                    continue
                clock.lap("idle")
                self._enter_step(message.step)
                launched.append((message, self._runner.launch(message)))
                self._answer(launched)
                if not launched:
                    self._enter_step(-1)
                clock.lap("sample")
        except BaseException as error:
            if self._is_over.is_set():  # what it waited for was aborted on purpose
                return None
            logger.exception("rank %d fails", self.assignment.rank)
            self._channel.report(error)
            self._release_graphs()
            self._groups.abort()
            return f"{type(error).__name__}: {error}"
        finally:
            self._release_graphs()
            self._channel.close()
        self._groups.close()
        return None

    def _release_graphs(self) -> None:
        """Give up the graphs of this epoch. NCCL's abort and shutdown wait, in any thread, until none holds its groups.

        So this comes before groups are aborted here, and before the side thread is joined, which may be aborting them.
        """
        if self._runner is not None and self._runner.graphs is not None:
            self._runner.graphs.release()

    def _end_epoch(self) -> None:
        """In the channel's side thread: log the stacks of all threads, then abort what the main thread waits for."""
        logger.warning("epoch over; the stacks of this rank follow")
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)  # names and lines only: no values, no prompt
        self._is_over.set()
        if self._groups is not None:
            self._groups.abort()

    def _num_operations(self) -> int:
        groups = self._groups
        return 0 if groups is None else groups.num_operations - self._num_uncounted

    def _next(self, launched: deque[tuple[StepBatch, Launched]]) -> ToRank:
        """Wait for the next message, and send the results of steps that end meanwhile."""
        assert self._runner is not None and self._channel is not None
        if launched:
            while launched and not self._channel.has_message():
                time.sleep(_LOOK_S)
                self._answer(launched)
            self._runner.clock.lap("compute")  # the device's, while the host only looked on
        return self._channel.receive()

    def _capture(self, message: Capture, launched: deque[tuple[StepBatch, Launched]]) -> None:
        """Capture a shape once the results of all steps before are sent, and report how it went."""
        assert self._runner is not None and self._channel is not None
        self._answer(launched)
        while launched:
            time.sleep(_LOOK_S)
            self._answer(launched)
        self._runner.clock.lap("compute")
        before = self._num_operations()
        reason_not = self._runner.capture(message.bucket)
        self._num_uncounted += self._num_operations() - before
        self._runner.clock.lap("capture")
        self._channel.answer(Captured(message.epoch, message.bucket, reason_not))

    def _answer(self, launched: deque[tuple[StepBatch, Launched]]) -> None:
        """Send the results that are ready, in the order of the steps; only the answering rank waits for its steps."""
        assert self._channel is not None
        is_answering = self.assignment.rank == self.assignment.plan.topology.answering_rank
        while launched and (not is_answering or launched[0][1].is_ready()):
            message, step = launched.popleft()
            if is_answering and message.entries:
                sampled = step.take()
                assert sampled is not None, "the last stage samples"
                self._channel.answer(StepResult(message.epoch, message.step, **vars(sampled)))

    def _progress(self) -> Callable[[int, int], None]:
        """A callback that logs every _PROGRESS_S how much is loaded."""
        said = time.monotonic()

        def say(done_bytes: int, total_bytes: int) -> None:
            nonlocal said
            if time.monotonic() - said > _PROGRESS_S:
                said = time.monotonic()
                self._say("loading: %.1f of %.1f GB", done_bytes / 1e9, total_bytes / 1e9)

        return say

    def _say(self, text: str, *values: object) -> None:
        shard = self.assignment.plan.shards[self.assignment.rank]
        logger.info("rank %d (stage %d, shard %d) %s", shard.rank, shard.stage, shard.shard, text % values)
