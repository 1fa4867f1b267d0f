"""The all-reduce of a stage over shared memory as a kernel that other kernels can call: exchange buffers, then sum.

The state of a stage is an array of int64 in each process; its words are named below. Addresses are int64.
"""

from typing import Any

import numpy as np
from numba import types

from cluster.collectives.compile import kernel
from cluster.collectives.elements import load_acquire, pause, pointer, round_to, store_release, to_float32

__all__ = ["all_reduce", "exchange", "shown_at", "sum_shards"]

OK, TIMED_OUT, ABORTED = -1, -2, -3  # the status of an exchange; from 0 on: that shard called something else

# Words of a state: the addresses of the shared memory and of its buffers; which shard of how many; exchanges begun so
# far; how long to wait; nanoseconds spent in exchanges so far; and two words for the system calls
BASE, BUFFERS, SHARD, SIZE, OPERATION, TIMEOUT_NS, SPENT_NS, _ROOM = range(8)
NUM_STATE_WORDS = _ROOM + 2

# The shared memory, in cache lines: an abort flag; a line that is not used here; a line for each shard, with its flag
# (the number of its last exchange) and descriptions of its last even and odd exchange; then a buffer for each shard and
# parity. No two shards write to the same line.
LINE_WORDS, NUM_HEAD_LINES = 8, 2
BUFFER_BYTES = 1 << 20  # of one shard; larger messages go in pieces, each of which still fits a core's cache
MOST_KINDS = 64  # a message's description is its bytes times this, plus its kind

_exact_kernel = kernel(fastmath=False)  # sums in the order of the shards
_TILE = 512  # numbers of a sum that are kept in float32 at a time
_WORD, _BYTE = np.int64(0), np.uint8(0)

_NUM_LOOKS = 500  # loads of a flag before the core is yielded: some 20 microseconds
_NOBODY_NS = 10_000  # sched_yield returns sooner than this where no other thread waits for the core
_SHORT_NS = 2_000_000  # after this time, sleeps grow
_SHORTEST_NAP_NS, _LONGEST_NAP_NS = 5_000, 500_000
_PR_SET_TIMERSLACK, _SLACK_NS = 29, 1_000  # the default slack would make each sleep 50 microseconds longer
_CLOCK_MONOTONIC = 1

_clock_gettime = types.ExternalFunction("clock_gettime", types.intc(types.intc, types.int64))
_nanosleep = types.ExternalFunction("nanosleep", types.intc(types.int64, types.int64))
_prctl = types.ExternalFunction("prctl", types.intc(types.intc, *[types.int64] * 4))
_sched_yield = types.ExternalFunction("sched_yield", types.intc())


def alone() -> "np.ndarray[Any, np.dtype[np.int64]]":
    """The state of a stage with one shard, which exchanges nothing."""
    state = np.zeros(NUM_STATE_WORDS, np.int64)
    state[SIZE] = 1
    return state


@_exact_kernel
def _now_ns(state: Any) -> Any:
    room = state[_ROOM:]
    _clock_gettime(_CLOCK_MONOTONIC, room.ctypes.data)
    return room[0] * 1_000_000_000 + room[1]


@_exact_kernel
def _nap(state: Any, duration_ns: int) -> None:
    room = state[_ROOM:]
    room[0], room[1] = 0, duration_ns
    _nanosleep(room.ctypes.data, 0)


@_exact_kernel
def _wait(state: Any, words: Any, flag: int, op: int) -> int:
    """Wait until a flag is at least `op`: yield the core, and where no other thread wants it, sleep → the status.

    The shard that is late may only lack a core. The kernel moves it to a core that is idle, not to one where another
    shard spins: so this one sleeps. Where more threads than cores want to run, yielding is enough.
    """
    began, nap_ns = _now_ns(state), _SHORTEST_NAP_NS
    _prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)  # of the calling thread
    while load_acquire(words, flag) < op:
        if load_acquire(words, 0):
            return ABORTED
        now = _now_ns(state)
        if now - began > state[TIMEOUT_NS]:
            return TIMED_OUT
        _sched_yield()
        if _now_ns(state) - now < _NOBODY_NS:
            _nap(state, nap_ns)
        if now - began > _SHORT_NS:
            nap_ns = min(2 * nap_ns, _LONGEST_NAP_NS)
    return OK


@_exact_kernel
def _copy(source: int, target: int, nbytes: int) -> None:
    whole = nbytes // 8
    from_words, to_words = pointer(source, _WORD), pointer(target, _WORD)
    for i in range(whole):
        to_words[i] = from_words[i]
    from_bytes, to_bytes = pointer(source, _BYTE), pointer(target, _BYTE)
    for i in range(8 * whole, nbytes):
        to_bytes[i] = from_bytes[i]


@_exact_kernel
def shown_at(state: Any) -> Any:
    """The address of shard 0's buffer of the present exchange; each next shard's lies BUFFER_BYTES further."""
    return state[BUFFERS] + (state[OPERATION] & 1) * state[SIZE] * BUFFER_BYTES


@_exact_kernel
def exchange(state: Any, description: int, source: int, nbytes: int) -> Any:
    """Copy at most BUFFER_BYTES into the own buffer and wait until all shards have done so → the status.

    All buffers can be read until the next exchange.
    """
    words = pointer(state[BASE], _WORD)
    if load_acquire(words, 0):
        return ABORTED
    began = _now_ns(state)
    state[OPERATION] += 1
    op, size, shard = state[OPERATION], state[SIZE], state[SHARD]
    own, place = (NUM_HEAD_LINES + shard) * LINE_WORDS, 1 + (op & 1)
    _copy(source, shown_at(state) + shard * BUFFER_BYTES, nbytes)
    words[own + place] = description
    store_release(words, own, op)  # last: it tells the others that the rest is there
    for other in range(size):
        flag = (NUM_HEAD_LINES + other) * LINE_WORDS
        looks = 0
        while load_acquire(words, flag) < op:
            looks += 1
            if looks > _NUM_LOOKS:
                status = _wait(state, words, flag, op)
                if status != OK:
                    return status
            pause()
    state[SPENT_NS] += _now_ns(state) - began
    for other in range(size):
        if words[(NUM_HEAD_LINES + other) * LINE_WORDS + place] != description:
            return other
    return OK


@_exact_kernel
def sum_shards(shown: int, size: int, out: int, count: int, dtype_tag: Any) -> None:
    """Sum `count` numbers of each shard in the order of the shards, in float32, rounded once.

    `shown`: the address of shard 0's numbers; each next shard's lie BUFFER_BYTES further.
    """
    out_p, first, second = pointer(out, dtype_tag), pointer(shown, dtype_tag), pointer(shown + BUFFER_BYTES, dtype_tag)
    if size == 2:
        for i in range(count):
            out_p[i] = round_to(to_float32(first[i]) + to_float32(second[i]), dtype_tag)
        return
    total = np.empty(_TILE, np.float32)
    for start in range(0, count, _TILE):
        length = min(_TILE, count - start)
        for i in range(length):
            total[i] = to_float32(first[start + i])
        for shard in range(1, size):
            theirs = pointer(shown + shard * BUFFER_BYTES, dtype_tag)
            for i in range(length):
                total[i] += to_float32(theirs[start + i])
        for i in range(length):
            out_p[start + i] = round_to(total[i], dtype_tag)


@_exact_kernel
def all_reduce(state: Any, kind: int, address: int, count: int, element_bytes: int, dtype_tag: Any) -> Any:
    """Sum `count` numbers over the shards, in place → the status."""
    description, at_once = count * element_bytes * MOST_KINDS + kind, BUFFER_BYTES // element_bytes
    for first in range(0, max(1, count), at_once):
        here, length = address + first * element_bytes, min(at_once, count - first)
        status = exchange(state, description, here, length * element_bytes)
        if status != OK:
            return status
        sum_shards(shown_at(state), state[SIZE], here, length, dtype_tag)
    return OK
