"""The engine's end of the step channel: ZeroMQ with CURVE, msgpack structs, an allowlist of keys for each epoch.

Every process makes its own key pair; only public keys travel, through Ray. A process that is not on the allowlist (a
stranger, a rank of an old epoch) fails the handshake. A message counts as coming from the rank whose key it came with.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from actors.decisions.failure.culprit import (
    Complaint,
    RankProgress,
    verdict_on_complaints,
    verdict_on_deaths,
    verdict_on_hang,
    verdict_on_silence,
)
from actors.decisions.failure.patience import HEARTBEAT_S, LOADING_SILENCE_S, SILENCE_S, StepClock
from actors.decisions.schedule.captures import CaptureRound
from actors.words.errors import GangFailure, Verdict
from actors.words.messages import (
    Bucket,
    Capture,
    Captured,
    Check,
    Fence,
    FromRank,
    Heartbeat,
    RankFailure,
    Shutdown,
    StepBatch,
    StepResult,
    ToRank,
)  # fmt: skip

logger = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_BLAME_S = 0.25  # a rank that lost its neighbor often reports that before the neighbor's death is noticed
ENCODER = msgspec.msgpack.Encoder()
_FROM_RANK: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, z85; the secret never leaves its process."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def make(cls) -> "KeyPair":
        """Make a new pair."""
        return cls(*zmq.curve_keypair())


@dataclass(frozen=True)
class ChannelAddress:
    """Where the engine's end listens, and the key that proves that it is the engine."""

    endpoint: str  # tcp://address:port
    public_key: bytes

    @property
    def port(self) -> int:
        """Of the endpoint."""
        return int(self.endpoint.rpartition(":")[2])


class _Allowlist:
    """The ranks that may connect, by public key (z85). The authenticator's thread asks it."""

    def __init__(self) -> None:
        self.rank_of: dict[str, int] = {}

    def callback(self, _domain: str, key: bytes) -> bool:
        """ZAP: whether the owner of this key (z85) may connect."""
        return key.decode() in self.rank_of


class EngineChannel:
    """An Executor over ranks. One thread uses it, except for `wake` and `fail`, which any may call."""

    def __init__(self, host: str, epoch: int, clock: StepClock | None = None, num_shards: int = 1) -> None:
        """Binds to `host` (the node's own address), on a port that the system chooses.

        `clock` knows from earlier epochs how long steps take; `num_shards` is that of a stage.
        """
        self.epoch = epoch
        self.clock = clock or StepClock(60.0)
        self.clock.begin_epoch()
        self._num_shards = num_shards
        self.progress_by_rank: dict[int, RankProgress] = {}  # by rank; only those that were heard
        self.seconds: dict[int, dict[str, float]] = {}  # rank → by phase; see PhaseClock
        self.shapes: Sequence[Bucket] = ()  # see Executor
        self._capture: CaptureRound | None = None  # that is under way
        self._captured: list[Captured] = []
        self._context = zmq.Context()
        self._allowlist = _Allowlist()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self._allowlist)
        keys = KeyPair.make()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret
        self._socket.set(zmq.ROUTER_MANDATORY, 1)  # a message that cannot be delivered is an error, not dropped
        self._socket.set(zmq.SNDHWM, 0)  # no limit: there are never more messages than steps in flight
        self._socket.set(zmq.LINGER, 200)
        self._socket.set(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = ChannelAddress(f"tcp://{host}:{port}", keys.public)
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)
        self._deaths: list[Complaint] = []
        self._reports: list[Complaint] = []  # of failing ranks
        self._is_closed = False
        self._lock = (
            threading.Lock()
        )  # over `_is_closed`: `wake` must not write to a closed descriptor, whose number may be in use again

    def admit(self, public_keys: list[bytes]) -> None:
        """Let the owners of these keys (in rank order) connect, and nobody else."""
        self._allowlist.rank_of = {key.decode(): rank for rank, key in enumerate(public_keys)}

    def wait_for_ranks(self, timeout_s: float) -> None:
        """Block until every admitted rank was heard on this channel. Raises GangFailure."""
        deadline = time.monotonic() + timeout_s
        expected = set(self._allowlist.rank_of.values())
        while missing := expected - set(self.progress_by_rank):
            if time.monotonic() > deadline:
                raise GangFailure(f"ranks {sorted(missing)} did not reach the step channel within {timeout_s:.0f} s")
            self._poll(0.2)
            self._raise_reports()

    def check_loading(self) -> None:
        """Raises GangFailure for a rank that fell silent while the gang starts, before there are steps."""
        self._poll(0)
        self._check_heard(time.monotonic(), LOADING_SILENCE_S)

    def submit(self, step: StepBatch) -> None:
        """See Executor."""
        if step.entries:
            self.clock.submitted(step.step, sum(len(entry.ids) or 1 for entry in step.entries), time.monotonic())
        self._broadcast(step)

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """See Executor."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            began = time.monotonic()
            ends = [end for end in (deadline, self.clock.deadline) if end is not None]
            left_s = max(0.0, min([began + HEARTBEAT_S, *ends]) - began)
            results, was_woken = self._poll(left_s)  # returns as soon as a result is here
            self._raise_reports()
            if results or self._captured:
                return results
            now = time.monotonic()
            if now - began < left_s + HEARTBEAT_S:  # else this process itself was stopped: read first
                self._check_silence(now)
            if was_woken or (deadline is not None and now >= deadline):
                return []

    def check(self) -> None:
        """See Executor."""
        self._broadcast(Check(self.epoch))

    def capture(self, bucket: Bucket) -> None:
        """See Executor."""
        assert self._capture is None, "one capture at a time"
        self._capture = CaptureRound(bucket, len(self._allowlist.rank_of))
        self.clock.capture_ordered(time.monotonic())
        self._broadcast(Capture(self.epoch, bucket))

    def take_captured(self) -> list[Captured]:
        """See Executor."""
        captured, self._captured = self._captured, []
        return captured

    def fence(self) -> None:
        """Tell all ranks, whatever they do, that the epoch is over; the gang ends those that cannot be reached."""
        for name, message in ((b"-side", Fence(self.epoch)), (b"", Shutdown(self.epoch))):
            with contextlib.suppress(GangFailure):
                self._broadcast(message, name)

    def wake(self) -> None:
        """See Executor."""
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self._wakeup, 1)

    def fail(self, reason: str, rank: int, is_death: bool = True) -> None:
        """Make `wait` raise GangFailure, because a rank is known to be gone. Any thread may call it."""
        at = self.progress_by_rank.get(rank, RankProgress(0.0))
        (self._deaths if is_death else self._reports).append(Complaint(rank, at.step, reason, at.op))
        self.wake()

    def close(self) -> None:
        """See Executor."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with contextlib.suppress(GangFailure):  # for ranks that are gone
            self._broadcast(Shutdown(self.epoch))
        self._socket.close()
        self._authenticator.stop()
        self._context.term()
        os.close(self._wakeup)

    def _check_heard(self, now: float, patience_s: float) -> None:
        if verdict := verdict_on_silence(self.progress_by_rank, now, patience_s):
            raise _failure(verdict)

    def _raise_reports(self) -> None:
        """Raises GangFailure if a rank reported one, once all that report within _BLAME_S are heard."""
        if self._reports:
            deadline = time.monotonic() + _BLAME_S
            while (left_s := deadline - time.monotonic()) > 0:
                self._poll(left_s)
            raise _failure(verdict_on_complaints(self._reports, self._num_shards))

    def _check_silence(self, now: float) -> None:
        """Raises GangFailure for a rank that is not heard any more, or a step that takes far too long."""
        self._check_heard(now, LOADING_SILENCE_S if self.clock.is_capturing else SILENCE_S)
        if self.clock.deadline is not None and now > self.clock.deadline:
            raise _failure(verdict_on_hang(self.clock.oldest, self.progress_by_rank, self._num_shards, now))

    def _broadcast(self, message: ToRank, name: bytes = b"") -> None:
        payload, unreachable = ENCODER.encode(message), []
        for rank in self._allowlist.rank_of.values():
            try:
                self._socket.send_multipart([identity(rank) + name, payload], copy=False)
            except zmq.ZMQError as error:
                unreachable.append(Complaint(rank, -1, f"the step channel lost rank {rank}: {error}"))
        if unreachable:
            raise _failure(verdict_on_deaths(unreachable))

    def _poll(self, timeout_s: float) -> tuple[list[StepResult], bool]:
        """Wait once → (results, whether `wake` was called). Raises GangFailure after a death."""
        events = dict(self._poller.poll(int(timeout_s * 1000)))
        was_woken = self._wakeup in events
        if was_woken:
            os.eventfd_read(self._wakeup)
        if self._deaths:
            raise _failure(verdict_on_deaths(self._deaths))
        results: list[StepResult] = []
        while self._socket in events:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._take(frames, results)
        return results, was_woken

    def _take(self, frames: list[zmq.Frame], results: list[StepResult]) -> None:
        rank = self._allowlist.rank_of.get(str(frames[-1].get("User-Id")))
        try:
            message = _FROM_RANK.decode(frames[-1].buffer)
        except msgspec.MsgspecError as error:
            reason = f"rank {rank} sent what is no message on the step channel: {error}"
            raise _failure(Verdict("silent", reason, () if rank is None else (rank,))) from error
        if rank is None or message.epoch != self.epoch:
            logger.warning("dropped a message of epoch %s from rank %s in epoch %s", message.epoch, rank, self.epoch)
            return
        match message:
            case StepResult():
                self.clock.completed(time.monotonic())
                results.append(message)
            case Heartbeat():
                self.progress_by_rank[rank] = RankProgress(time.monotonic(), message.step, message.op)
                self.seconds[rank] = message.seconds
            case Captured():
                if self._capture is not None and (outcome := self._capture.take(rank, message)):
                    self.clock.capture_ended(time.monotonic())
                    self._captured.append(outcome)
                    self._capture = None
            case RankFailure():
                reason = f"rank {rank} failed at step {message.step}: {message.error}"
                self._reports.append(Complaint(rank, message.step, reason, message.op, message.is_echo))


def identity(rank: int) -> bytes:
    """The ZeroMQ identity of a rank's socket, by which the engine's socket finds it."""
    return b"rank-%d" % rank


def _failure(verdict: Verdict) -> GangFailure:
    return GangFailure(verdict.reason, verdict)
