"""Admission: limits how much is let in at once, by sequences and by waiting tokens; the rest is refused at once."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from configs.config import AdmissionConfig
from deployments.api.errors import ApiError, server_full
from deployments.api.fair_places import FairPlaces
from deployments.api.service_rate import ServiceRate


class WaitingPrompt:
    """The tokens of a request that has no answer yet."""

    def __init__(self, admission: "Admission", num_tokens: int) -> None:
        self._admission = admission
        self._num_tokens = num_tokens

    def end(self, has_begun: bool = True) -> None:
        """The request has its first token (`has_begun`), or has ended before. May be called twice."""
        self._admission.num_waiting_tokens -= self._num_tokens
        if has_begun and self._num_tokens:
            self._admission.tokens.note(self._num_tokens)
        self._num_tokens = 0


class Admission:
    """Counts sequences from before tokenizing until the last byte is sent. Used in the event loop's thread only."""

    def __init__(self, settings: AdmissionConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_waiting_tokens = 0  # of prompts whose first token has not come
        self.tokens = ServiceRate(clock)
        self._sequences = ServiceRate(clock)
        self._places = FairPlaces(settings.max_requests, clock)
        self._max_waiting_tokens = settings.max_waiting_tokens
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def wait_until_idle(self) -> None:
        """Returns when no admitted sequence is left."""
        await self._is_idle.wait()

    @property
    def max_requests(self) -> int:
        """Sequences that are let in at once."""
        return self._places.total

    @property
    def num_admitted(self) -> int:
        """Sequences that are in."""
        return self._places.num_taken

    def check_room(self, key: str, count: int = 1) -> None:
        """Raises ApiError (503) where there is no room for `count` sequences of a key. Cheap: no body is read yet."""
        if lacking := self._places.num_lacking(key, count):
            retry_after_s = self._sequences.retry_after_s(lacking, self.num_admitted)
            raise server_full(self._fullness(key, count), retry_after_s)
        self._check_waiting(1)

    @contextmanager
    def reserve(self, count: int, key: str = "") -> Iterator[Callable[[], None]]:
        """Let `count` sequences of a key in while the block runs, which calls what it is given once they are served.

        Raises ApiError: 503 when full, or when other keys may still want what is free; 400 when never possible.
        """
        if count > self.max_requests:
            raise ApiError(
                400,
                f"prompt: {count} answers in one request (prompts times n), but this server takes at most "
                f"{self.max_requests}; send several requests",
                param="prompt",
            )
        self.check_room(key, count)
        self._places.take(key, count)
        self._is_idle.clear()
        served: list[int] = []  # what is refused later has made no room: how fast places come free is not told by it
        try:
            yield partial(served.append, count)
        finally:
            self._places.give_back(key, count)
            if served:
                self._sequences.note(count)
            if not self.num_admitted:
                self._is_idle.set()

    @contextmanager
    def wait(self, num_tokens: int) -> Iterator[WaitingPrompt]:
        """Let a prompt of so many tokens wait for its first token. Raises ApiError (503) when too many wait already."""
        self._check_waiting(num_tokens)
        self.num_waiting_tokens += num_tokens
        waiting = WaitingPrompt(self, num_tokens)
        try:
            yield waiting
        finally:
            waiting.end(has_begun=False)

    def _fullness(self, key: str, count: int) -> str:
        """Why there is no room for `count` sequences of a key, in words."""
        if self.num_admitted + count > self.max_requests:
            return f"{self.max_requests} requests"
        share = math.floor(self._places.share())
        return f"of its {self.max_requests} places {share} are this key's share while other keys ask too"

    def _check_waiting(self, num_tokens: int) -> None:
        """Whoever finds nobody waiting is let in, however long the prompt."""
        limit, held = self._max_waiting_tokens, self.num_waiting_tokens
        if limit is not None and held and held + num_tokens > limit:
            retry_after_s = self.tokens.retry_after_s(min(held, held + num_tokens - limit), held)
            raise server_full(f"{held} prompt tokens wait", retry_after_s)
