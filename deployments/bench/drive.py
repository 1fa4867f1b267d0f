"""Drives a server with one load: a closed loop of clients that wait for their answers, or arrivals that do not."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from deployments.bench.figures import Load, Timeline
from deployments.bench.load import arrivals_s

_PAUSE_S = 0.1  # of a client whose request failed, so that a server that refuses is not flooded

Send = Callable[[int], Awaitable[Timeline]]  # sends the request of this index


@dataclass(frozen=True)
class Extent:
    """When to stop sending; what has been sent is waited for."""

    num_requests: int | None = None
    seconds: float | None = None


@dataclass
class Progress:
    """How much of one load is done. Read while it runs."""

    load: Load
    extent: Extent
    began_s: float = field(default_factory=time.perf_counter)
    num_sent: int = 0
    timelines: list[Timeline] = field(default_factory=list)  # of requests that have ended
    num_tokens: int = 0
    num_failed: int = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self.began_s

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        if self.extent.num_requests:
            return len(self.timelines) / self.extent.num_requests
        return min(1.0, self.elapsed_s / (self.extent.seconds or 1.0))

    def may_send(self) -> bool:
        """Whether another request is to be sent."""
        if self.extent.num_requests is not None and self.num_sent >= self.extent.num_requests:
            return False
        return self.extent.seconds is None or self.elapsed_s < self.extent.seconds

    def next_index(self) -> int:
        """The index of the next request, which counts as sent from now on."""
        self.num_sent += 1
        return self.num_sent - 1

    def add(self, timeline: Timeline) -> None:
        """Record a request that has ended."""
        self.timelines.append(timeline)
        self.num_failed += bool(timeline.error)
        self.num_tokens += 0 if timeline.error else timeline.num_tokens


async def drive(send: Send, progress: Progress, seed: int) -> float:
    """Send until the extent is reached and every answer has ended; seconds of CPU that this process took meanwhile."""
    cpu_s = time.process_time()
    if progress.load.concurrency:
        await asyncio.gather(*(_client(send, progress) for _ in range(progress.load.concurrency)))
    else:
        assert progress.load.rate
        await _arrivals(send, progress, arrivals_s(progress.load.rate, seed))
    return time.process_time() - cpu_s


async def _client(send: Send, progress: Progress) -> None:
    """One client: sends its next request when the last one has ended."""
    while progress.may_send():
        timeline = await send(progress.next_index())
        progress.add(timeline)
        if timeline.error:
            await asyncio.sleep(_PAUSE_S)


async def _arrivals(send: Send, progress: Progress, at_s: Iterator[float]) -> None:
    """Send each request when it is due, whether or not earlier ones have ended."""

    async def one(index: int) -> None:
        progress.add(await send(index))

    running: set[asyncio.Task[None]] = set()
    for due_s in at_s:
        if not progress.may_send() or due_s >= (progress.extent.seconds or math.inf):
            break
        await asyncio.sleep(max(0.0, due_s - progress.elapsed_s))
        task = asyncio.create_task(one(progress.next_index()))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
