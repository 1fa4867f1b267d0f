"""Draining: a replica finishes what runs and takes nothing more, as a stage's node leaves or it was told to stop."""

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which app.py does without
    from deployments.api.service import Service

logger = logging.getLogger(__name__)

WATCH_S = 2.0  # between two looks at the cluster's nodes


def leaving_node(
    own: str, others: Collection[str], draining: Mapping[str, float], now: float, last_s: float
) -> str | None:
    """The node because of which a replica has to drain, or None. Times in seconds since 1970.

    `own` is the replica's node: Serve itself moves the replica off it, and starts another one first, so that only the
    last `last_s` before the node's deadline count. `others` are the nodes of further stages, which Serve does not
    watch. `draining`: node → its deadline, 0 for none.
    """
    for node in others:
        if node != own and node in draining:
            return node
    deadline = draining.get(own, 0)
    return own if deadline and deadline - now <= last_s else None


class Drain:
    """Drains one replica. It may be started from any thread, and cannot be undone."""

    def __init__(self, service: "Service", drain_s: float, give_up: Callable[[], None]) -> None:
        """`give_up` ends, with an error each, the requests that are not finished after `drain_s`."""
        self._service = service
        self._drain_s = drain_s
        self._give_up = give_up
        self._is_over = threading.Event()
        self.reason = ""  # why the replica has to be replaced; empty while it need not be

    async def finish(self) -> None:
        """Refuse new requests; returns when the running ones have ended, or `drain_s` is over and they were ended."""
        self._service.is_draining = True
        try:
            async with asyncio.timeout(self._drain_s):
                await self._service.admission.wait_until_idle()
        except TimeoutError:
            await asyncio.to_thread(self._end_what_is_left)

    def watch(self, find_leaving_node: Callable[[], str | None]) -> None:
        """Watch the nodes from a thread; one that leaves makes the replica drain and be replaced."""
        threading.Thread(target=self._watch, args=(find_leaving_node,), name="drain", daemon=True).start()

    def stop_watching(self) -> None:
        """End the watching thread. May be called twice."""
        self._is_over.set()

    def _watch(self, find_leaving_node: Callable[[], str | None]) -> None:
        while not self._is_over.wait(WATCH_S):
            try:
                node = find_leaving_node()
            except Exception:  # the cluster's head may be away for a while; requests do not need it
                logger.exception("the cluster did not answer which nodes are drained; asking again")
                continue
            if node is not None:
                self.reason = f"node {node} is being drained: the replica has to start elsewhere"
                self._service.is_draining = True
                logger.warning(self.reason)
                if not self._is_over.wait(self._drain_s) and self._service.admission.num_admitted:
                    self._end_what_is_left()  # or Serve and the node would cut them, without a word to their clients
                return

    def _end_what_is_left(self) -> None:
        num_left = self._service.admission.num_admitted
        logger.warning("%d requests are ended: they ran on for timeouts.drain_s (%g s)", num_left, self._drain_s)
        self._give_up()
