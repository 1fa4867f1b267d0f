"""The rendezvous of an epoch's ranks: a key-value store on a socket bound beforehand; the epoch prefixes its keys."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

_POLL_S = 0.05  # longest pause between two checks of a key
_REQUEST_TIMEOUT_S = 30.0  # for one answer of the store's server, which answers at once while its process lives


class JoinCancelled(RuntimeError):
    """The epoch was given up while ranks were still meeting. Handled by the rank: it waits for the next epoch."""


class EpochStore:
    """The keys of one epoch. Values are JSON: nothing that is read here can run code."""

    def __init__(self, store: Store, epoch: int, timeout_s: float, cancelled: threading.Event | None = None) -> None:
        self.epoch = epoch
        self.timeout_s = timeout_s
        self.cancelled = cancelled
        self._store = PrefixStore(f"epoch{epoch}", store)

    def put(self, key: str, value: Any) -> None:
        """Publish a value for the other ranks."""
        self._store.set(key, json.dumps(value))

    def take(self, key: str) -> Any:
        """Wait for a value that another rank puts. Raises TimeoutError or JoinCancelled."""
        return self.take_all([key])[0]

    def take_all(self, keys: Iterable[str]) -> list[Any]:
        """Wait for several values → in the order of the keys.

        Raises TimeoutError, which names the missing keys, or JoinCancelled.
        """
        keys = list(keys)
        deadline = time.monotonic() + self.timeout_s
        pause_s = 0.001
        while not self._store.check(keys):
            self.raise_if_cancelled()
            if time.monotonic() > deadline:
                missing = [key for key in keys if not self._store.check([key])]
                raise TimeoutError(f"epoch {self.epoch}: after {self.timeout_s:g} s nobody said {', '.join(missing)}")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_S)
        return [json.loads(self._store.get(key)) for key in keys]

    def raise_if_cancelled(self) -> None:
        """Raises JoinCancelled if the epoch was given up."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise JoinCancelled(f"epoch {self.epoch} was given up")

    def roll_call(self, name: str, rank: int, num_ranks: int) -> None:
        """Return once every rank has called it. Raises TimeoutError, which names the missing ranks."""
        self.put(f"{name}/rank{rank}", rank)
        self.take_all(f"{name}/rank{other}" for other in range(num_ranks))

    def part(self, name: str) -> Store:
        """The part of the store that one process group uses."""
        return PrefixStore(name, self._store)


def host_store(address: str) -> tuple[Store, int]:
    """Serve a store at the node's own address, on a port that the kernel chooses → (store, port).

    The socket listens before the port is published, so no other process can take it, and on no other interface. The
    caller keeps the store for as long as ranks use it; it serves any number of epochs.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen at {address}: {error}; it must be an address of this node") from error
    port = int(listener.getsockname()[1])
    store = TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=_REQUEST_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )
    logger.info("rendezvous at %s port %d", address, port)
    return store, port


def join_store(
    address: str, port: int, epoch: int, timeout_s: float, cancelled: threading.Event | None = None
) -> EpochStore:
    """Connect to the store that another process (or this one) serves. Raises TimeoutError or RuntimeError.

    `cancelled`, set by another thread, makes a rank leave while it waits for others.
    """
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        raise TimeoutError(f"no rendezvous at {address} port {port} within {timeout_s:g} s: {error}") from error
    store.set_timeout(timedelta(seconds=_REQUEST_TIMEOUT_S))
    return EpochStore(store, epoch, timeout_s, cancelled)
