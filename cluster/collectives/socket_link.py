"""The hop between two stages on CPU: one TCP connection in one direction, which only the neighbor can open.

Why not gloo: `abort` in another thread does not end its receive, which stays blocked until its timeout, so a survivor
could not leave a broken epoch in time. Any thread can shut a socket down, a socket shows at once that the neighbor has
died, and a hop of 16 KB takes a third of the time.
"""

import contextlib
import hmac
import logging
import queue
import secrets
import selectors
import socket
import struct
import threading
import time
from typing import Any

import torch

from cluster.collectives.interface import NeighborLate, NeighborLost
from cluster.collectives.rendezvous import EpochStore

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<QQ")  # number of the hop, bytes that follow
_TOKEN_BYTES = 32
_LOOK_S = 0.2  # how often a rank that waits checks whether its epoch was given up


class SocketSending:
    """A send that has begun: most end before `send` returns, large ones in the link's thread."""

    def __init__(self, link: "SocketLink", tensor: torch.Tensor, rest: memoryview) -> None:
        self.rest = rest
        self._link = link
        self._tensor = tensor  # kept alive until its bytes have left
        self._done = threading.Event()
        self._error: Exception | None = None

    def finish(self, error: Exception | None = None) -> None:
        """Mark it as ended; called once, when the last byte was sent or sending failed."""
        self._error = error
        self._done.set()

    def wait(self) -> None:
        """Block until the buffer may be used again. Raises TimeoutError or RuntimeError."""
        if not self._done.wait(self._link.timeout_s):
            raise NeighborLate(f"{self._link.name}: a send did not end within {self._link.timeout_s:g} s")
        if self._error is not None:
            raise self._error


class SocketLink:
    """A Link over a connected socket: one side only sends, the other only receives. Any thread may call `abort`."""

    def __init__(self, connection: socket.socket, name: str, timeout_s: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout_s)  # a hop fails when no byte moves for this long
        self.name = name
        self.timeout_s = timeout_s
        self._connection = connection
        self._num_hops = 0
        self._aborted = False
        self._lock = threading.Lock()  # over the backlog
        self._backlog = 0  # sends that the thread has not finished; later sends queue behind them
        self._queue: queue.SimpleQueue[SocketSending | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def num_operations(self) -> int:
        """Hops sent, or completely received."""
        return self._num_hops

    def send(self, tensor: torch.Tensor) -> SocketSending:
        """Start to send a contiguous tensor and return at once. Raises RuntimeError when the link is down."""
        payload = _bytes_of(tensor)
        message = memoryview(_HEADER.pack(self._num_hops, len(payload)))
        self._num_hops += 1
        with self._lock:
            sent = 0 if self._backlog else self._send_what_fits(message, payload)
            if sent == len(message) + len(payload):
                sending = SocketSending(self, tensor, payload[:0])
                sending.finish()
                return sending
            rest = payload[sent - len(message) :] if sent >= len(message) else None
            sending = SocketSending(self, tensor, rest if rest is not None else _joined(message[sent:], payload))
            self._backlog += 1
            self._queue.put(sending)
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_backlog, name=f"send {self.name}", daemon=True)
                self._thread.start()
        return sending

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor. Raises TimeoutError or RuntimeError, also when something else was sent."""
        payload = _bytes_of(tensor)
        header = bytearray(_HEADER.size)
        self._fill(memoryview(header))
        hop, nbytes = _HEADER.unpack(header)
        if hop != self._num_hops or nbytes != len(payload):
            raise RuntimeError(
                f"{self.name}: hop {hop} brings {nbytes} bytes, but hop {self._num_hops} of {len(payload)} was expected"
            )
        self._num_hops += 1
        self._fill(payload)

    def abort(self) -> None:
        """Make operations on both sides, now and later, raise RuntimeError. Any thread may call it."""
        self._aborted = True
        with contextlib.suppress(OSError):  # not connected any more
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; what was sent before still arrives. May be called twice."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(self.timeout_s)
            self._thread = None
        self._connection.close()

    def _send_what_fits(self, header: memoryview, payload: memoryview) -> int:
        try:
            return self._connection.sendmsg([header, payload], (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._failure(error) from error

    def _send_backlog(self) -> None:
        while (sending := self._queue.get()) is not None:
            failure: Exception | None = None
            try:
                self._connection.sendall(sending.rest)
            except OSError as error:
                failure = self._failure(error)
            with self._lock:
                self._backlog -= 1
            sending.finish(failure)

    def _fill(self, buffer: memoryview) -> None:
        while len(buffer):
            try:
                count = self._connection.recv_into(buffer)
            except OSError as error:
                raise self._failure(error) from error
            if count == 0:
                raise self._failure(ConnectionError("the neighbor closed it or died"))
            buffer = buffer[count:]

    def _failure(self, error: OSError) -> Exception:
        if self._aborted:
            return NeighborLost(f"{self.name}: aborted")
        if isinstance(error, TimeoutError):
            return NeighborLate(f"{self.name}: no byte moved for {self.timeout_s:g} s")
        return NeighborLost(f"{self.name}: {error}")


def connect_links(
    store: EpochStore,
    rank: int,
    previous: int | None,
    following: int | None,
    address: str,
    timeout_s: float,
    name: str = "link",
) -> tuple[SocketLink | None, SocketLink | None]:
    """(link from the previous rank, link to the following rank), None where there is no such rank.

    `name` tells kinds of links between the same ranks apart. Every rank listens before it connects to the next one, so
    that no order of starting can block. It listens at the node's own address, and accepts only a connection that sends
    the token in the store. Raises TimeoutError or RuntimeError.
    """
    listener, token = None, secrets.token_hex(_TOKEN_BYTES // 2).encode()
    link_in = link_out = None
    try:
        if previous is not None:
            listener = socket.create_server(
                (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=16
            )
            store.put(f"{name}/to{rank}", [address, listener.getsockname()[1], token.decode()])
        if following is not None:
            link_out = SocketLink(
                _connect(store.take(f"{name}/to{following}"), store.timeout_s),
                f"{name} {rank} to {following}",
                timeout_s,
            )
        if listener is not None:
            link_in = SocketLink(_accept(listener, token, store), f"{name} {previous} to {rank}", timeout_s)
    except BaseException:
        if link_out is not None:
            link_out.close()
        raise
    finally:
        if listener is not None:
            listener.close()
    return link_in, link_out


def _connect(listening: Any, timeout_s: float) -> socket.socket:
    address, port, token = listening
    try:
        connection = socket.create_connection((address, port), timeout=timeout_s)
    except TimeoutError:
        raise TimeoutError(f"no way to {address} port {port} within {timeout_s:g} s: is a firewall between?") from None
    except OSError as error:
        raise RuntimeError(f"no way to {address} port {port}: {error}") from error
    connection.sendall(token.encode())
    return connection


def _accept(listener: socket.socket, token: bytes, store: EpochStore) -> socket.socket:
    """Wait for the first connection that sends the token, while others are open too. Raises TimeoutError."""
    deadline = time.monotonic() + store.timeout_s
    received: dict[socket.socket, bytes] = {}
    chosen = None
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while chosen is None and time.monotonic() < deadline:
            store.raise_if_cancelled()
            for key, _ in selector.select(_LOOK_S):
                visitor = key.fileobj
                assert isinstance(visitor, socket.socket)
                if visitor is listener:
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    received[connection] = b""
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                piece = _read(visitor, _TOKEN_BYTES - len(received[visitor]))
                received[visitor] += piece
                if hmac.compare_digest(received[visitor], token):
                    chosen = visitor
                elif not piece or len(received[visitor]) == _TOKEN_BYTES:
                    logger.warning("refused a connection that does not belong to this gang")
                    selector.unregister(visitor)
                    del received[visitor]
                    visitor.close()
    for visitor in received:
        if visitor is not chosen:
            visitor.close()
    if chosen is None:
        raise TimeoutError(f"the sending rank did not connect within {store.timeout_s:g} s")
    return chosen


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """Read what has come; empty when the other side has left."""
    try:
        return connection.recv(num_bytes)
    except OSError:
        return b""


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    assert tensor.is_contiguous() and tensor.is_cpu, "a link on CPU takes contiguous CPU tensors"
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _joined(*parts: memoryview) -> memoryview:
    return memoryview(b"".join(parts))
