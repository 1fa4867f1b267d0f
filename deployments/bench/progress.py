"""Shows the progress of a load test: a bar on a terminal, elsewhere a plain line every few seconds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TextIO

from deployments.bench.drive import Progress

_BAR_S, _LINE_S = 0.25, 10.0  # between two updates: drawing takes CPU from the server that is measured
_WIDTH = 24


@contextlib.asynccontextmanager
async def shown(progress: Progress, stream: TextIO) -> AsyncIterator[None]:
    """Show the progress while the block runs, and once more at its end."""
    task = asyncio.create_task(_show(progress, stream))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        _draw(progress, stream, end="\n")


async def _show(progress: Progress, stream: TextIO) -> None:
    while True:
        await asyncio.sleep(_BAR_S if stream.isatty() else _LINE_S)
        _draw(progress, stream, end="" if stream.isatty() else "\n")


def _draw(progress: Progress, stream: TextIO, end: str) -> None:
    begin = "\r\x1b[K" if stream.isatty() else ""
    stream.write(begin + line(progress, with_bar=stream.isatty()) + end)
    stream.flush()


def line(progress: Progress, with_bar: bool) -> str:
    """One line: how much is done, how fast, and how many requests failed."""
    filled = round(progress.share * _WIDTH)
    bar = f" [{'#' * filled}{'.' * (_WIDTH - filled)}]" if with_bar else ""
    asked = f" of {progress.extent.num_requests}" if progress.extent.num_requests else ""
    rate = progress.num_tokens / max(progress.elapsed_s, 1e-9)
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    done = len(progress.timelines)
    return (
        f"{progress.load!s:<6}{bar} {done}{asked} done, {progress.num_sent - done} running, "
        f"{progress.elapsed_s:.0f} s, {rate:.0f} tokens/s{failed}"
    )
