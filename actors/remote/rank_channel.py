"""A rank's end of the step channel: steps in, results out, and a side thread for heartbeats and the epoch's end."""

import contextlib
import os
import threading
from collections.abc import Callable

import msgspec
import zmq

from actors.decisions.failure.patience import HEARTBEAT_S
from actors.remote.channel import ENCODER, ChannelAddress, KeyPair, identity
from actors.words.messages import Captured, Fence, FromRank, Heartbeat, RankFailure, StepBatch, StepResult, ToRank
from cluster.collectives.interface import NeighborLost

_TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)


class RankChannel:
    """One thread uses it; heartbeats go over another socket, from a side thread."""

    def __init__(
        self,
        address: ChannelAddress,
        keys: KeyPair,
        rank: int,
        epoch: int,
        when_fenced: Callable[[], None] = lambda: None,
        count_ops: Callable[[], int] = lambda: 0,
    ) -> None:
        """`when_fenced` is called in the side thread, at most once, when the epoch is over.

        `count_ops`, also called there, returns how many collectives and hops the rank has begun.
        """
        self.rank = rank
        self.epoch = epoch
        self.step = -1  # last step begun
        self._when_fenced, self._count_ops = when_fenced, count_ops
        self.seconds: dict[str, float] = {}  # by phase; set by the thread that executes the steps
        self._address, self._keys = address, keys
        self._context = zmq.Context()
        self._socket = self._connect(identity(rank))
        self._is_closing = False
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC)
        self._side = threading.Thread(target=self._attend, name="rank-side", daemon=True)
        self._send(self._socket, Heartbeat(epoch, -1))
        self._side.start()

    def receive(self) -> ToRank:
        """Block until a message of the engine is here."""
        message = _TO_RANK.decode(self._socket.recv())
        if isinstance(message, StepBatch):
            self.step = message.step
        return message

    def has_message(self) -> bool:
        """Whether `receive` would not wait."""
        return bool(self._socket.poll(0))

    def answer(self, result: StepResult | Captured) -> None:
        """Send a step's result, or how a capture ended."""
        self._send(self._socket, result)

    def report(self, error: BaseException) -> None:
        """Report that this rank cannot go on, if the engine still listens."""
        reason, is_echo = f"{type(error).__name__}: {error}", isinstance(error, NeighborLost)
        with contextlib.suppress(zmq.Again):
            self._send(self._socket, RankFailure(self.epoch, self.step, reason, self._count_ops(), is_echo))

    def close(self) -> None:
        """Stop the side thread and leave. May be called twice."""
        if self._is_closing:
            return
        self._is_closing = True
        os.eventfd_write(self._wakeup, 1)
        self._side.join()
        self._socket.close()
        self._context.term()
        os.close(self._wakeup)

    def _attend(self) -> None:
        """The side thread: send heartbeats, and wait for the end of the epoch."""
        socket = self._connect(identity(self.rank) + b"-side")
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        while not self._is_closing:
            with contextlib.suppress(zmq.Again):  # the engine is gone, or does not know this rank
                self._send(socket, Heartbeat(self.epoch, self.step, self.seconds, self._count_ops()))
            if socket in dict(poller.poll(int(HEARTBEAT_S * 1000))):
                message = _TO_RANK.decode(socket.recv())
                if isinstance(message, Fence) and message.epoch == self.epoch:
                    self._when_fenced()
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
        socket.send(ENCODER.encode(message))
