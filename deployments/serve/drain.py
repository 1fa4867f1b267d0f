"""Draining: what runs is finished and nothing more is taken, because a stage's node goes or somebody said so."""

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it brings torch, and is imported where ranks are not asked for yet
    from deployments.api.service import Service

logger = logging.getLogger(__name__)

WATCH_S = 2.0  # between two looks at the cluster's nodes


def leaving_node(
    own: str, others: Collection[str], draining: Mapping[str, float], now: float, drain_s: float
) -> str | None:
    """The node for which a replica has to drain, None for none. Times in seconds since 1970.

    `own` is the replica's node: Serve moves the replica off it by itself and starts another one first, so that only
    the last `drain_s` before its deadline count. Of the `others`, where further stages are, Serve knows nothing.
    `draining`: node → its deadline, 0 for none.
    """
    for node in others:
        if node != own and node in draining:
            return node
    deadline = draining.get(own, 0)
    return own if deadline and deadline - now <= drain_s else None


class Drain:
    """One replica's way out. It may be begun from any thread, and is never taken back."""

    def __init__(self, service: "Service", drain_s: float, give_up: Callable[[], None]) -> None:
        """`give_up` ends, with an error each, the requests that are not finished after `drain_s`."""
        self._service = service
        self._drain_s = drain_s
        self._give_up = give_up
        self._is_over = threading.Event()
        self.reason = ""  # why the replica has to be replaced; empty where it is only told to stop

    async def finish(self) -> None:
        """Take nothing more; returns when all that runs has ended, or was given up."""
        self._service.is_draining = True
        try:
            async with asyncio.timeout(self._drain_s):
                await self._service.admission.wait_until_idle()
        except TimeoutError:
            logger.warning("%d requests are cut after %g s", self._service.admission.num_admitted, self._drain_s)
            await asyncio.to_thread(self._give_up)

    def watch(self, find_leaving_node: Callable[[], str | None]) -> None:
        """Look at the nodes from a thread of its own; a node that leaves ends the replica."""
        threading.Thread(target=self._watch, args=(find_leaving_node,), name="drain", daemon=True).start()

    def stop_watching(self) -> None:
        """The replica ends. May be called twice."""
        self._is_over.set()

    def _watch(self, find_leaving_node: Callable[[], str | None]) -> None:
        while not self._is_over.wait(WATCH_S):
            try:
                node = find_leaving_node()
            except Exception:  # the cluster's head may be away for a while; requests do not need it
                logger.exception("the cluster does not say which nodes are drained")
                continue
            if node is not None:
                self.reason = f"node {node} is being drained: the replica has to start elsewhere"
                self._service.is_draining = True
                logger.warning(self.reason)
                return
