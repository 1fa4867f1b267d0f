"""The all-reduce and all-gather of a stage on CPU: memory that its shards share, sequence flags, no system call.

Why it is right. Operation n of a shard writes its data into the shard's buffer n % 2, then raises the shard's flag to
n, then waits until every flag is at least n, then reads everybody's buffer n % 2. That buffer is written again by
operation n + 2, which begins after every flag reached n + 1, that is after everybody has read operation n. x86 keeps
stores in order and loads in order, so who sees the flag sees the data; elsewhere `share_memory` answers None.

The memory is anonymous (memfd): it has no name in /dev/shm, needs no room there, and is gone with its last user.
"""

import ctypes
import logging
import mmap
import os
import platform
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster import exchange
from cluster.collectives import NeighbourLate, NeighbourLost
from cluster.elements import LIKE
from cluster.rendezvous import EpochStore

logger = logging.getLogger(__name__)

BUFFER_BYTES = 1 << 20  # of one shard; larger messages go in pieces, each of which still fits a core's cache
_LINE_BYTES = 64  # a cache line: no two shards write to the same one
_WORDS = _LINE_BYTES // 8
_TOKEN_BYTES = 16
_NUM_HEAD_LINES = 2  # abort flag; token
_MEMORY_NAME = "stagemesh"
_MOST_VIEWS = 256  # shapes whose views are kept: prompts have many lengths, decoding few batch sizes

_NUM_LOOKS = 500  # at a flag, before the core is given away: some 20 microseconds
_NOBODY_S = 0.00001  # a core that was offered is back so soon where nobody wants it
_NAPS_S = 0.002  # how long naps are short
_SLEEP_S = (0.000005, 0.0005)  # shortest and longest
_PR_SET_TIMERSLACK, _SLACK_NS = 29, 1000  # the kernel's own slack would make each nap 50 microseconds longer

_LIBC = ctypes.CDLL(None)
_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16]
_DTYPES += [torch.uint8, torch.int8, torch.bool]
_DTYPE_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_KINDS = ("all_reduce", "all_gather")


class SharedMemoryStage:
    """A StageGroup over one shared mapping. Operations are called by one thread, `abort` by any."""

    def __init__(self, mapping: mmap.mmap, size: int, shard: int, timeout_s: float) -> None:
        self.size = size
        self.shard = shard
        self.timeout_s = timeout_s
        self._words = memoryview(mapping).cast("q")
        # [parity, shard, byte]: one operation's buffers lie side by side
        data_bytes = 2 * size * BUFFER_BYTES
        self._data = torch.frombuffer(mapping, dtype=torch.uint8, offset=_head_bytes(size), count=data_bytes).view(
            2, size, BUFFER_BYTES
        )
        self._buffers = self._data.data_ptr()
        self._flags = self._buffers - _head_bytes(size) + _NUM_HEAD_LINES * _LINE_BYTES
        self._views: dict[tuple[torch.Size, torch.dtype], list[list[torch.Tensor]]] = {}
        self._op = 0
        self._out_of_use: str | None = None  # why no operation may follow

    @property
    def num_operations(self) -> int:
        """Begun so far."""
        return self._op

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the shards in shard order, in place; bfloat16 and float16 are summed in float32."""
        nbytes = tensor.nbytes
        like = LIKE.get(tensor.dtype)
        for piece in _pieces(tensor, nbytes):
            shown = self._exchange(0, piece, nbytes)
            if like is None:
                _sum_shards(self._views_of(piece), piece)
            else:
                exchange.sum_shards(shown, BUFFER_BYTES, self.size, piece.data_ptr(), piece.numel(), like)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[*] of every shard → [size, *]."""
        nbytes = tensor.nbytes
        gathered = []
        for piece in _pieces(tensor, nbytes):
            self._exchange(1, piece, nbytes)
            gathered.append(torch.stack(self._views_of(piece)))
        whole = gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=1)
        return whole.view(self.size, *tensor.shape)

    def abort(self) -> None:
        """Make every shard that waits, now or later, leave with RuntimeError. Any thread may call it."""
        self._words[0] = 1 + self.shard

    def close(self) -> None:
        """Forbid further operations; the memory goes once nothing refers to it. May be called twice."""
        self._out_of_use = self._out_of_use or "it was closed"
        self._views.clear()
        self._data = torch.empty(0)
        self._words = memoryview(bytearray(8)).cast("q")

    def _exchange(self, kind: int, piece: torch.Tensor, message_bytes: int) -> int:
        """Show a piece [*] to all shards → the address of what shard 0 shows, valid until the next operation."""
        words = self._words
        if self._out_of_use or words[0]:
            raise NeighbourLost(f"stage group: {self._out_of_use or _aborted(words)}")
        self._op += 1
        op, size, shard = self._op, self.size, self.shard
        shown = self._buffers + (op & 1) * size * BUFFER_BYTES
        own = shown + shard * BUFFER_BYTES
        descriptor = (message_bytes * len(_DTYPES) + _DTYPE_CODE[piece.dtype]) * len(_KINDS) + kind
        who = exchange.meet(
            self._flags, _WORDS, shard, size, op, descriptor, piece.data_ptr(), own, piece.nbytes, _NUM_LOOKS
        )
        if who == exchange.LATE:
            self._wait(words, op)
            who = exchange.meet(self._flags, _WORDS, shard, size, op, descriptor, own, own, 0, 0)
        if who != exchange.HERE:
            theirs = words[(_NUM_HEAD_LINES + who) * _WORDS + 1 + (op & 1)]
            self._out_of_use = (
                f"operation {op} differs: shard {shard} called {_operation(descriptor)}, "
                f"shard {who} {_operation(theirs)}"
            )
            raise RuntimeError(f"stage group: {self._out_of_use}")
        return shown

    def _views_of(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """What each shard shows in this operation, as [*]. Kept: making a view costs as much as a small sum."""
        shape, dtype = piece.shape, piece.dtype
        views = self._views.get((shape, dtype))
        if views is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            nbytes = shape.numel() * dtype.itemsize
            views = [[shard[:nbytes].view(dtype).view(shape) for shard in buffers] for buffers in self._data]
            self._views[shape, dtype] = views
        return views[self._op & 1]

    def _wait(self, words: memoryview, op: int) -> None:
        """Return once every flag is at least `op`: give the core to whoever waits for it, else nap.

        Who is late may lack just a core: an interrupted process is moved to an idle one at once, but not to one where
        somebody looks at a flag. Where more processes than cores want to run, naps would only interrupt them.
        """
        for flag in range(_NUM_HEAD_LINES * _WORDS, (_NUM_HEAD_LINES + self.size) * _WORDS, _WORDS):
            if words[flag] < op:
                self._wait_patiently(words, flag, op)

    def _wait_patiently(self, words: memoryview, flag: int, op: int) -> None:
        began = time.monotonic()
        sleep_s = _SLEEP_S[0]
        _LIBC.prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)  # of this thread, whichever it is
        while words[flag] < op:
            if words[0]:
                raise NeighbourLost(f"stage group: {_aborted(words)}")
            waited_s = time.monotonic() - began
            if waited_s > self.timeout_s:
                raise NeighbourLate(self._behind(words, op))
            asked = time.monotonic()
            os.sched_yield()
            if time.monotonic() - asked < _NOBODY_S:
                time.sleep(sleep_s)
            if waited_s > _NAPS_S:
                sleep_s = min(2 * sleep_s, _SLEEP_S[1])

    def _behind(self, words: memoryview, op: int) -> str:
        """Who is behind; what this group holds is undefined from here on, so nothing may follow."""
        reached = {shard: words[(_NUM_HEAD_LINES + shard) * _WORDS] for shard in range(self.size)}
        behind = ", ".join(f"shard {shard} (at {at})" for shard, at in reached.items() if at < op)
        self._out_of_use = f"operation {op} timed out after {self.timeout_s:g} s, behind: {behind}"
        return f"stage group: {self._out_of_use}"


def share_memory(store: EpochStore, stage: int, size: int, shard: int) -> mmap.mmap | None:
    """Map the same memory in every shard of a stage, or answer None in every one of them (and log why).

    Shard 0 makes it, the others open it through /proc: they run as the same user on the same node. All learn
    from all whether that worked, so that nobody is left with another kind of group. Raises TimeoutError.
    """
    name = f"memory/stage{stage}"
    length = _head_bytes(size) + 2 * size * BUFFER_BYTES
    mapping, reason, fd = None, None, -1
    try:
        if platform.machine().lower() not in ("x86_64", "amd64") or not hasattr(os, "memfd_create"):
            raise OSError(f"no shared memory on {platform.system()} {platform.machine()}")
        if shard == 0:
            fd, token = os.memfd_create(_MEMORY_NAME, os.MFD_CLOEXEC), secrets.token_bytes(_TOKEN_BYTES)
            os.ftruncate(fd, length)
            mapping = mmap.mmap(fd, length)
            mapping[_LINE_BYTES : _LINE_BYTES + _TOKEN_BYTES] = token
            store.put(name, [os.getpid(), fd, token.hex()])
        else:
            mapping = _map_theirs(store.take(name), length)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        reason = str(error)
        if shard == 0:
            store.put(name, [0, -1, ""])
    try:
        store.put(f"{name}/shard{shard}", reason)
        reasons = store.take_all(f"{name}/shard{other}" for other in range(size))
    finally:
        if fd >= 0:
            os.close(fd)  # all have mapped it, or never will
    if any(reasons):
        logger.warning("stage %d: no shared memory, gloo instead: %s", stage, next(filter(None, reasons)))
        return None
    return mapping


def _map_theirs(where: tuple[int, int, str], length: int) -> mmap.mmap:
    """Open the memory of shard 0. Raises OSError when it is out of reach, or not what shard 0 meant."""
    pid, fd, token = where
    path = Path(f"/proc/{pid}/fd/{fd}")
    # In another pid namespace the same number is another process: look before opening.
    if not str(path.readlink()).startswith(f"/memfd:{_MEMORY_NAME}"):
        raise OSError(f"{path} is not the memory of shard 0")
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(opened).st_size != length:
            raise OSError(f"{path} has another size")
        mapping = mmap.mmap(opened, length)
    finally:
        os.close(opened)
    if mapping[_LINE_BYTES : _LINE_BYTES + _TOKEN_BYTES] != bytes.fromhex(token):
        raise OSError(f"{path} belongs to another gang")
    return mapping


def _head_bytes(size: int) -> int:
    """Bytes before the data, in whole pages."""
    used = (_NUM_HEAD_LINES + size) * _LINE_BYTES
    return -(-used // mmap.PAGESIZE) * mmap.PAGESIZE


def _pieces(tensor: torch.Tensor, nbytes: int) -> Sequence[torch.Tensor]:
    """What is exchanged at a time: the tensor itself, or flat parts of it that fit a buffer."""
    assert tensor.is_contiguous() and tensor.is_cpu, "a stage group on CPU takes contiguous CPU tensors"
    assert tensor.dtype in _DTYPE_CODE, f"{tensor.dtype} is not exchanged between shards"
    if nbytes <= BUFFER_BYTES:
        return (tensor,)
    return torch.split(tensor.view(-1), BUFFER_BYTES // tensor.itemsize)


def _sum_shards(shown: list[torch.Tensor], total: torch.Tensor) -> None:
    """Sum in shard order into `total`: every shard adds the same numbers in the same order."""
    if len(shown) > 2 and total.dtype in _LOW_PRECISION:
        wide = shown[0].float()
        for theirs in shown[1:]:
            wide += theirs
        total.copy_(wide)
    else:  # two low-precision numbers are added in float32 and rounded once by torch itself
        torch.add(shown[0], shown[1], out=total)
        for theirs in shown[2:]:
            total += theirs


def _aborted(words: memoryview) -> str:
    return f"it was aborted by shard {words[0] - 1}"


def _operation(descriptor: int) -> str:
    rest, kind = divmod(descriptor, len(_KINDS))
    nbytes, code = divmod(rest, len(_DTYPES))
    return f"{_KINDS[kind]} of {nbytes} bytes {_DTYPES[code]}"
