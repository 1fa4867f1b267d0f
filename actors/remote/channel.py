"""The step channel: ZeroMQ ROUTER/DEALER with CURVE, msgpack structs, and an allowlist of keys for each epoch.

Every process makes its own key pair; only public keys travel, through Ray. Whoever is not on the allowlist (a stranger,
a rank of an old epoch) fails the handshake, and what a rank says is held against the rank that its key stands for.
"""

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from actors.decisions.patience import HEARTBEAT_S, LOADING_SILENCE_S, SILENCE_S, StepClock, silent_ranks
from actors.words.errors import GangFailure
from actors.words.messages import FromRank, Heartbeat, RankFailure, Shutdown, StepBatch, StepResult, ToRank

logger = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_BLAME_S = 0.25  # whoever lost its neighbour often speaks before it is known that the neighbour died
_ENCODER = msgspec.msgpack.Encoder()
_TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_FROM_RANK: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, z85; the secret never leaves its process."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def make(cls) -> "KeyPair":
        """A new pair."""
        return cls(*zmq.curve_keypair())


@dataclass(frozen=True)
class ChannelAddress:
    """Where the engine's end listens and what proves that it is the engine."""

    endpoint: str  # tcp://address:port
    public_key: bytes


class _Allowlist:
    """Who may speak: rank by public key (z85). Asked by the authenticator's thread."""

    def __init__(self) -> None:
        self.rank_of: dict[str, int] = {}

    def callback(self, _domain: str, key: bytes) -> bool:
        """ZAP: whether the owner of this key (z85) may connect."""
        return key.decode() in self.rank_of


class EngineChannel:
    """The engine's end; an Executor. One thread uses it, except for `wake` and `fail`."""

    def __init__(self, host: str, epoch: int, first_step_s: float = 60.0) -> None:
        """Binds to `host` (the node's own address), on a port that the system chooses.

        `first_step_s`: patience with a step while none has shown yet what steps take.
        """
        self.epoch = epoch
        self._clock = StepClock(first_step_s)
        self.last_heartbeat: dict[int, tuple[float, int]] = {}  # rank → (monotonic seconds, step)
        self.seconds: dict[int, dict[str, float]] = {}  # rank → by phase; see StepClock
        self._context = zmq.Context()
        self._allowlist = _Allowlist()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self._allowlist)
        keys = KeyPair.make()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret
        self._socket.set(zmq.ROUTER_MANDATORY, 1)  # a message that cannot be delivered is an error, not a silence
        self._socket.set(zmq.SNDHWM, 0)  # the number of steps in flight is the bound
        self._socket.set(zmq.LINGER, 200)
        self._socket.set(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = ChannelAddress(f"tcp://{host}:{port}", keys.public)
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)
        self._failure: str | None = None
        self._reports: list[str] = []  # what failing ranks said
        self._is_closed = False
        self._lock = threading.Lock()  # over it: `wake` must not write to a descriptor that is another's by now

    def admit(self, public_keys: list[bytes]) -> None:
        """Let these ranks in (by rank), and nobody else."""
        self._allowlist.rank_of = {key.decode(): rank for rank, key in enumerate(public_keys)}

    def wait_for_ranks(self, timeout_s: float) -> None:
        """Block until every admitted rank was heard on this channel. Raises GangFailure."""
        deadline = time.monotonic() + timeout_s
        expected = set(self._allowlist.rank_of.values())
        while missing := expected - set(self.last_heartbeat):
            if time.monotonic() > deadline:
                raise GangFailure(f"ranks {sorted(missing)} did not reach the step channel within {timeout_s:.0f} s")
            self._poll(0.2)
            if self._reports:
                self._raise_reports()

    def check_loading(self) -> None:
        """Raises GangFailure for a rank that fell silent while the gang starts: no step is there that could be late."""
        self._poll(0)
        self._check_heard(time.monotonic(), LOADING_SILENCE_S)

    def submit(self, step: StepBatch) -> None:
        """See Executor."""
        if step.entries:
            self._clock.submitted(step.step, sum(len(entry.ids) or 1 for entry in step.entries), time.monotonic())
        self._broadcast(_ENCODER.encode(step))

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """See Executor."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            began = time.monotonic()
            ends = [end for end in (deadline, self._clock.deadline) if end is not None]
            left_s = max(0.0, min([began + HEARTBEAT_S, *ends]) - began)
            results, was_woken = self._poll(left_s)  # a result ends it at once; heartbeats end it now and then anyway
            if self._reports:
                self._raise_reports()
            if results:
                return results
            now = time.monotonic()
            if now - began < left_s + HEARTBEAT_S:  # else this process was stopped itself: first hear what was said
                self._check_silence(now)
            if was_woken or (deadline is not None and now >= deadline):
                return []

    def wake(self) -> None:
        """See Executor."""
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self._wakeup, 1)

    def fail(self, reason: str) -> None:
        """Make `wait` raise GangFailure: somebody knows that a rank is gone. Any thread; the first reason counts."""
        self._failure = self._failure or reason
        self.wake()

    def close(self) -> None:
        """See Executor."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with contextlib.suppress(GangFailure):  # a rank that is gone needs no telling
            self._broadcast(_ENCODER.encode(Shutdown(self.epoch)))
        self._socket.close()
        self._authenticator.stop()
        self._context.term()
        os.close(self._wakeup)

    def _check_heard(self, now: float, patience_s: float) -> None:
        if silent := silent_ranks({rank: heard for rank, (heard, _) in self.last_heartbeat.items()}, now, patience_s):
            raise GangFailure(f"nothing is heard from rank {', '.join(map(str, silent))}: dead, stopped or cut off")

    def _raise_reports(self) -> NoReturn:
        """Raises GangFailure: with the word of whoever calls `fail` within a moment, else with the first report."""
        deadline = time.monotonic() + _BLAME_S
        while (left_s := deadline - time.monotonic()) > 0:
            self._poll(left_s)
        raise GangFailure(self._reports[0])

    def _check_silence(self, now: float) -> None:
        """Raises GangFailure for a rank that is not heard any more, or a step that takes far too long."""
        self._check_heard(now, SILENCE_S)
        if self._clock.deadline is not None and now > self._clock.deadline:
            begun = {rank: step for rank, (_, step) in self.last_heartbeat.items()}
            behind = min(begun, key=lambda rank: begun[rank])
            raise GangFailure(
                f"step {self._clock.oldest} takes far longer than steps do; "
                f"rank {behind} is furthest behind, at step {begun[behind]}"
            )

    def _broadcast(self, payload: bytes) -> None:
        unreachable = []
        for rank in self._allowlist.rank_of.values():
            try:
                self._socket.send_multipart([_identity(rank), payload], copy=False)
            except zmq.ZMQError as error:
                unreachable.append(f"rank {rank}: {error}")
        if unreachable:
            raise GangFailure("the step channel lost " + "; ".join(unreachable))

    def _poll(self, timeout_s: float | None) -> tuple[list[StepResult], bool]:
        """Wait once; returns results, and whether somebody called `wake`."""
        events = dict(self._poller.poll(None if timeout_s is None else int(timeout_s * 1000)))
        was_woken = self._wakeup in events
        if was_woken:
            os.eventfd_read(self._wakeup)
        if self._failure:
            raise GangFailure(self._failure)
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
            raise GangFailure(f"rank {rank} spoke nonsense on the step channel: {error}") from error
        if rank is None or message.epoch != self.epoch:
            logger.warning(
                "dropped a message of epoch %s from rank %s: this is epoch %s", message.epoch, rank, self.epoch
            )
            return
        match message:
            case StepResult():
                self._clock.completed(time.monotonic())
                results.append(message)
            case Heartbeat():
                self.last_heartbeat[rank], self.seconds[rank] = (time.monotonic(), message.step), message.seconds
            case RankFailure():
                self._reports.append(f"rank {rank} failed at step {message.step}: {message.error}")


class RankChannel:
    """A rank's end. One thread uses it; heartbeats go over a socket of their own, from a side thread."""

    def __init__(self, address: ChannelAddress, keys: KeyPair, rank: int, epoch: int) -> None:
        self.rank = rank
        self.epoch = epoch
        self.step = -1  # last step begun
        self.seconds: dict[str, float] = {}  # by phase; whoever executes the steps puts its clock's here
        self._address, self._keys = address, keys
        self._context = zmq.Context()
        self._socket = self._connect(_identity(rank))
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._send(self._socket, Heartbeat(epoch, rank, -1))
        self._beats.start()

    def receive(self) -> ToRank:
        """Block until the engine says something."""
        message = _TO_RANK.decode(self._socket.recv())
        if isinstance(message, StepBatch):
            self.step = message.step
        return message

    def answer(self, result: StepResult) -> None:
        """Send a step's result."""
        self._send(self._socket, result)

    def report(self, error: BaseException) -> None:
        """Say that this rank cannot go on; whoever listens."""
        with contextlib.suppress(zmq.Again):
            self._send(self._socket, RankFailure(self.epoch, self.rank, self.step, f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """Stop the heartbeat and leave."""
        self._stop.set()
        self._beats.join()
        self._socket.close()
        self._context.term()

    def _beat(self) -> None:
        socket = self._connect(_identity(self.rank) + b"-heartbeat")
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(zmq.Again):  # nobody takes it: the engine is gone, or does not know this rank
                self._send(socket, Heartbeat(self.epoch, self.rank, self.step, self.seconds))
        socket.close()

    def _connect(self, identity: bytes) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.IDENTITY, identity)
        socket.set(zmq.LINGER, 200)
        socket.set(zmq.SNDTIMEO, 1000)
        socket.curve_serverkey = self._address.public_key
        socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
        socket.connect(self._address.endpoint)
        return socket

    @staticmethod
    def _send(socket: "zmq.Socket[bytes]", message: FromRank) -> None:
        socket.send(_ENCODER.encode(message))


def _identity(rank: int) -> bytes:
    return b"rank-%d" % rank
