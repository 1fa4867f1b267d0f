"""Admission: limits how many sequences are let in at once; a request above that is refused before it costs anything."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.api.errors import ApiError

RETRY_AFTER_S = 1


class Admission:
    """Counts sequences from before tokenizing until the last byte is sent. Used in the event loop's thread only."""

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self.num_admitted = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def wait_until_idle(self) -> None:
        """Returns when no admitted sequence is left."""
        await self._is_idle.wait()

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Let `count` sequences in while the block runs. Raises ApiError: 503 when full, 400 when never possible."""
        if count > self.max_requests:
            raise ApiError(
                400,
                f"prompt: {count} answers in one request (prompts times n), but this server takes at most "
                f"{self.max_requests}; send several requests",
                param="prompt",
            )
        if self.num_admitted + count > self.max_requests:
            raise ApiError(
                503,
                f"the server is full ({self.max_requests} requests); try again later",
                code="server_overloaded",
                retry_after_s=RETRY_AFTER_S,
            )
        self.num_admitted += count
        self._is_idle.clear()
        try:
            yield
        finally:
            self.num_admitted -= count
            if not self.num_admitted:
                self._is_idle.set()
