"""The two kernels of an exchange over shared memory: show and wait, then sum.

They take addresses, and hold Python's lock: they are over in microseconds, and who gives it up may have to wait for it.
"""

from typing import Any

import numpy as np
from numba import njit

from cluster.elements import OPTIONS, load_acquire, narrow, pause, pointer, store_release, wide

__all__ = ["HERE", "LATE", "meet", "sum_shards"]

HERE, LATE = -1, -2  # what `meet` says when all have shown the same, and when one has not come yet

_EXACT = {**OPTIONS, "fastmath": False, "nogil": False}  # sums in the order of the shards
_TILE = 512  # numbers of a sum that are kept in float32 at a time
_WORD = np.int64(0)


@njit(**_EXACT)
def meet(
    flags: int, line: int, shard: int, size: int, op: int, descriptor: int, source: int, target: int, nbytes: int,
    num_looks: int,
) -> int:  # fmt: skip
    """Copy `nbytes` from `source` to `target` (nothing for the same), raise the own flag, wait for all → HERE or LATE.

    Or a shard whose descriptor differs. `flags`: the address of the first shard's line of `line` words, which are its
    flag, then its descriptors of even and odd operations. Nobody is waited for longer than `num_looks`.
    """
    words = pointer(flags, _WORD)
    place = 1 + (op & 1)
    if source != target:
        whole = nbytes // 8
        from_words, to_words = pointer(source, _WORD), pointer(target, _WORD)
        for i in range(whole):
            to_words[i] = from_words[i]
        from_bytes, to_bytes = pointer(source, np.uint8(0)), pointer(target, np.uint8(0))
        for i in range(8 * whole, nbytes):
            to_bytes[i] = from_bytes[i]
        words[shard * line + place] = descriptor
        store_release(words, shard * line, op)  # last: it says that the rest is there
    for other in range(size):
        looks = 0
        while load_acquire(words, other * line) < op:
            looks += 1
            if looks > num_looks:
                return LATE
            pause()
    for other in range(size):
        if words[other * line + place] != descriptor:
            return other
    return HERE


@njit(**_EXACT)
def sum_shards(shown: int, step: int, size: int, out: int, count: int, like: Any) -> None:
    """Sum `count` numbers of each shard in the order of the shards, in float32, rounded once.

    `shown`: the address of shard 0's; the next shard's lie `step` bytes further.
    """
    out_p, first, second = pointer(out, like), pointer(shown, like), pointer(shown + step, like)
    if size == 2:
        for i in range(count):
            out_p[i] = narrow(wide(first[i]) + wide(second[i]), like)
        return
    total = np.empty(_TILE, np.float32)
    for start in range(0, count, _TILE):
        length = min(_TILE, count - start)
        for i in range(length):
            total[i] = wide(first[start + i])
        for shard in range(1, size):
            theirs = pointer(shown + shard * step, like)
            for i in range(length):
                total[i] += wide(theirs[start + i])
        for i in range(length):
            out_p[start + i] = narrow(total[i], like)
