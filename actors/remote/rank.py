"""One rank of a gang: joins its groups, loads its slices, executes steps in the channel's order until it is told."""

import logging
import time
from collections.abc import Callable

import torch

from actors.remote.channel import KeyPair, RankChannel
from actors.remote.meeting import Assignment, Loaded, Meeting
from actors.tensors.runner import Runner
from actors.tensors.source import resolve_source
from actors.words.messages import StepBatch, StepResult
from cluster.groups import Groups, join
from cluster.rendezvous import host_store, join_store

logger = logging.getLogger(__name__)

_PROGRESS_S = 2.0


class Rank:
    """Owns (stage, shard): its part of the model, its cache, its groups. A plain class; an actor wraps it."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self._keys = KeyPair.make()
        self._device = torch.device(assignment.device)
        if self._device.type == "cpu":
            torch.set_num_threads(1)  # ranks are the parallelism; two threads a rank would fight over the cores
        else:
            torch.cuda.set_device(self._device)
        self._groups: Groups | None = None
        self._runner: Runner | None = None
        self._channel: RankChannel | None = None

    def public_key(self) -> bytes:
        """The key by which the engine knows this process."""
        return self._keys.public

    def host_store(self) -> int:
        """Rank 0 only: hold the rendezvous store for this gang's life; returns its port."""
        self._store, port = host_store(self.assignment.address)
        return port

    def join(self, meeting: Meeting) -> None:
        """Come together: store, process groups (warmed up), step channel. Raises TimeoutError."""
        this, started = self.assignment, time.monotonic()
        store = join_store(meeting.store_address, meeting.store_port, meeting.epoch, this.timeout_s)
        self._groups = join(this.plan.topology, this.rank, store, self._device, this.address, this.timeout_s)
        self._channel = RankChannel(meeting.channel, self._keys, this.rank, meeting.epoch)
        self._say("joined its groups in %.1f s", time.monotonic() - started)

    def load(self, memory_share: float, ranks_on_node: int) -> Loaded:
        """Read this rank's slices. Raises CheckpointError, UnsupportedModel."""
        assert self._groups is not None, "load before join"
        this = self.assignment
        self._runner = Runner(this.plan, this.rank, self._groups, self._device)
        folder = resolve_source(this.source, this.revision)
        report = self._runner.load(folder, self._progress())
        self._say("loaded %.1f MB in %.1f s", report.bytes_copied / 1e6, report.seconds)
        fits = self._runner.num_blocks_that_fit(memory_share, ranks_on_node)
        return Loaded(this.plan.shards[this.rank].weight_bytes, report.seconds, fits)

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache and run the shapes it will meet once."""
        assert self._runner is not None, "allocate before load"
        self._runner.allocate_cache(num_blocks)
        self._runner.warm_up()
        self._say("ready: %d KV blocks", num_blocks)

    def serve(self) -> None:
        """Execute steps until the engine says Shutdown. Errors are reported, end the neighbours' wait, are raised."""
        assert self._runner is not None and self._channel is not None and self._groups is not None, "serve before load"
        clock = self._runner.clock
        self._channel.seconds = clock.seconds
        is_answering = self.assignment.rank == self.assignment.plan.topology.answering_rank
        try:
            while isinstance(message := self._channel.receive(), StepBatch):
                clock.lap("idle")
                sampled = self._runner.execute(message)
                if is_answering and message.entries:
                    assert sampled is not None, "the last stage samples"
                    self._channel.answer(StepResult(message.epoch, message.step, **vars(sampled)))
                clock.lap("sample")
        except BaseException as error:
            self._channel.report(error)
            self._groups.abort()
            raise
        finally:
            self._channel.close()
        self._groups.close()

    def _progress(self) -> Callable[[int, int], None]:
        """Says now and then how much is loaded."""
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
