"""Work that takes milliseconds, done aside from the event loop in one thread: large bodies are read and written there.

One thread, because each that computes may keep the interpreter's lock from the event loop for 5 ms in a row.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

LARGE_BYTES = 1 << 16  # of a body; less is read in a millisecond or so, and a thread would cost a wait
LARGE_TOKENS = 1024  # whose log-probabilities, ids or names are written; each may take 10 µs

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")

Given = ParamSpec("Given")
Found = TypeVar("Found")


async def aside(is_large: bool, work: Callable[Given, Found], *args: Given.args, **kwargs: Given.kwargs) -> Found:
    """What `work` returns or raises; in the thread if it is large, else at once."""
    if not is_large:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_thread, partial(work, *args, **kwargs))
