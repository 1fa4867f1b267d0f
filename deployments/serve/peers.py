"""The metrics of all replicas of a deployment: each is asked through Serve when somebody asks one of them."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray import serve

from deployments.api.metric_pages import merged

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0  # a scrape may take 10 s in Prometheus' own settings
_KEPT_S = 1.0  # a page, at most
_KEPT_TIMES = 10  # as long as it took: whoever asks again and again takes a tenth of the time for it


class Peers:
    """The replicas of this replica's deployment, itself included."""

    def __init__(self, method: str, own: Callable[[], bytes]) -> None:
        """`method`: of the deployment's class, which returns the page of one replica; `own` gives this one's."""
        self._method = method
        self._own = own
        self._handle: Any = None  # made at the first scrape: most replicas that are alone are never asked
        self._page = b""
        self._kept_until = 0.0
        self._lock = asyncio.Lock()

    async def metrics(self) -> bytes:
        """One page of all replicas that Serve counts as running; this one's own where one of them does not answer.

        Those who ask at once get one page; it is kept for a moment.
        """
        async with self._lock:
            if (began := time.monotonic()) >= self._kept_until:
                self._page = await self._ask()
                ended = time.monotonic()
                self._kept_until = ended + min(_KEPT_S, _KEPT_TIMES * (ended - began))
            return self._page

    async def _ask(self) -> bytes:
        try:
            if self._handle is None:
                context = serve.get_replica_context()
                self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
            pages = await self._handle.broadcast(self._method).results_async(timeout_s=_ANSWER_S)
        except Exception as error:  # noqa: BLE001 - a scrape is answered whatever is wrong with the others
            logger.warning("not all replicas gave their metrics: %r", error)
            return self._own()
        return merged(pages)
