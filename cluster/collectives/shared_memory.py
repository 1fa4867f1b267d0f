"""The all-reduce and all-gather of a stage on CPU, over memory that its shards share.

Operation n of a shard writes its data into the shard's buffer n % 2, sets the shard's flag to n, waits until every flag
is at least n, and then reads all buffers n % 2. A buffer is written again by operation n + 2, which begins after every
flag has reached n + 1, so after all shards have read operation n. x86 keeps stores in order and loads in order, so a
shard that sees a flag sees the data; on other machines `share_memory` returns None. While all shards are in time there
is no system call.

The memory is anonymous (memfd): it has no name in /dev/shm, takes no room there, and is freed with its last user.
"""

import logging
import mmap
import os
import platform
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.collectives import exchange
from cluster.collectives.compile import KERNELS
from cluster.collectives.elements import DTYPE_TAGS
from cluster.collectives.exchange import BUFFER_BYTES, LINE_WORDS, MOST_KINDS, NUM_HEAD_LINES
from cluster.collectives.interface import NeighborLate, NeighborLost
from cluster.collectives.rendezvous import EpochStore

logger = logging.getLogger(__name__)

_LINE_BYTES = 8 * LINE_WORDS
_TOKEN_BYTES = 16  # in the second line
_MEMORY_NAME = "stagemesh"
_MOST_VIEWS = 256  # kept at a time: prompts have many lengths, decode steps few batch sizes

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16]
_DTYPES += [torch.uint8, torch.int8, torch.bool]
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_OPERATIONS = ("all_reduce", "all_gather")
_KINDS = [(operation, dtype) for operation in _OPERATIONS for dtype in _DTYPES]
_KIND = {pair: number for number, pair in enumerate(_KINDS)}
assert len(_KINDS) <= MOST_KINDS


class SharedMemoryStage:
    """A StageGroup over one shared mapping. Operations are called by one thread, `abort` by any."""

    can_abort = True

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
        buffers = self._data.data_ptr()
        self._state = np.zeros(exchange.NUM_STATE_WORDS, np.int64)
        self._state[exchange.BASE], self._state[exchange.BUFFERS] = buffers - _head_bytes(size), buffers
        self._state[exchange.SHARD], self._state[exchange.SIZE] = shard, size
        self._state[exchange.TIMEOUT_NS] = int(timeout_s * 1e9)
        self._views: dict[tuple[torch.Size, torch.dtype], list[list[torch.Tensor]]] = {}
        self._out_of_use: str | None = None  # why no operation may follow

    @property
    def num_operations(self) -> int:
        """Operations begun so far."""
        return int(self._state[exchange.OPERATION])

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the shards in shard order, in place; bfloat16 and float16 are summed in float32."""
        dtype_tag, kind = DTYPE_TAGS.get(tensor.dtype), _kind_of("all_reduce", tensor)
        if dtype_tag is None:
            for piece in _pieces(tensor):
                _sum_shards(self._exchange(kind, piece, tensor.nbytes), piece)
            return tensor
        state, _memory = self.lend_state()
        self.check(exchange.all_reduce(state, kind, tensor.data_ptr(), tensor.numel(), tensor.itemsize, dtype_tag))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[*] of every shard → [size, *]."""
        kind = _kind_of("all_gather", tensor)
        gathered = [torch.stack(self._exchange(kind, piece, tensor.nbytes)) for piece in _pieces(tensor)]
        whole = gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=1)
        return whole.view(self.size, *tensor.shape)

    def abort(self) -> None:
        """Make every shard's operations, now and later, raise NeighborLost. Any thread may call it."""
        self._words[0] = 1 + self.shard

    def close(self) -> None:
        """Forbid further operations; the memory is freed once nothing refers to it. May be called twice."""
        self._out_of_use = self._out_of_use or "it was closed"
        self._views.clear()
        self._data = torch.empty(0)
        self._words = memoryview(bytearray(8)).cast("q")

    def lend_state(self) -> tuple["np.ndarray[Any, np.dtype[np.int64]]", torch.Tensor]:
        """The state for kernels that exchange, and the memory, which stays valid while the caller holds it.

        Another thread may close the group meanwhile. Raises NeighborLost when no operation may follow.
        """
        lent = self._state, self._data
        if self._out_of_use or self._words[0]:
            raise NeighborLost(f"stage group: {self._out_of_use or _aborted(self._words)}")
        return lent

    def check(self, status: int) -> None:
        """Raise the error of an exchange whose status is not OK."""
        if status == exchange.OK:
            return
        words, op = self._words, self.num_operations
        if status == exchange.ABORTED or self._out_of_use:
            raise NeighborLost(f"stage group: {self._out_of_use or _aborted(words)}")
        if status == exchange.TIMED_OUT:
            raise NeighborLate(self._behind(words, op))
        own, theirs = (words[(NUM_HEAD_LINES + shard) * LINE_WORDS + 1 + (op & 1)] for shard in (self.shard, status))
        self._out_of_use = (
            f"operation {op} differs: shard {self.shard} called {_operation(own)}, shard {status} {_operation(theirs)}"
        )
        raise RuntimeError(f"stage group: {self._out_of_use}")

    def _exchange(self, kind: int, piece: torch.Tensor, message_bytes: int) -> list[torch.Tensor]:
        """Exchange a piece [*] with all shards → every shard's piece; they stay until the next operation."""
        description = message_bytes * MOST_KINDS + kind
        state, memory = self.lend_state()
        self.check(exchange.exchange(state, description, piece.data_ptr(), piece.nbytes))
        return self._views_of(piece, memory)

    def _views_of(self, piece: torch.Tensor, memory: torch.Tensor) -> list[torch.Tensor]:
        """Views [*] of every shard's piece in this operation; kept, as making one costs as much as a small sum."""
        shape, dtype = piece.shape, piece.dtype
        views = self._views.get((shape, dtype))
        if views is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            nbytes = shape.numel() * dtype.itemsize
            views = [[shard[:nbytes].view(dtype).view(shape) for shard in buffers] for buffers in memory]
            self._views[shape, dtype] = views
        return views[self.num_operations & 1]

    def _behind(self, words: memoryview, op: int) -> str:
        """A message that names the shards that are late. No operation may follow: the buffers are undefined now."""
        reached = {shard: words[(NUM_HEAD_LINES + shard) * LINE_WORDS] for shard in range(self.size)}
        behind = ", ".join(f"shard {shard} (at {at})" for shard, at in reached.items() if at < op)
        self._out_of_use = f"operation {op} timed out after {self.timeout_s:g} s, behind: {behind}"
        return f"stage group: {self._out_of_use}"


def share_memory(store: EpochStore, stage: int, size: int, shard: int) -> mmap.mmap | None:
    """Map the same memory in every shard of a stage → the mapping, or None in all of them, with the reason logged.

    Shard 0 creates it, the others open it through /proc: they run as the same user on the same node. Each learns from
    all others whether that worked, so that all make the same kind of group. Raises TimeoutError.
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
            store.put(name, [os.getpid(), fd, token.hex(), KERNELS])
        else:
            mapping = _map_theirs(store.take(name), length)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        reason = str(error)
        if shard == 0:
            store.put(name, [0, -1, "", KERNELS])
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


def _map_theirs(where: tuple[int, int, str, str], length: int) -> mmap.mmap:
    """Map the memory of shard 0. Raises OSError when it cannot be opened, or is not shard 0's."""
    pid, fd, token, kernels = where
    if kernels != KERNELS:
        raise OSError("shard 0 exchanges by kernels of another version: the files were changed; start all ranks anew")
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
    used = (NUM_HEAD_LINES + size) * _LINE_BYTES
    return -(-used // mmap.PAGESIZE) * mmap.PAGESIZE


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The pieces that are exchanged one after the other: the tensor itself, or flat parts of it that fit a buffer."""
    if tensor.nbytes <= BUFFER_BYTES:
        return (tensor,)
    return torch.split(tensor.view(-1), BUFFER_BYTES // tensor.itemsize)


def kind_of_all_reduce(dtype: torch.dtype) -> int:
    """The kind in the description of an all-reduce, for kernels; see MOST_KINDS."""
    return _KIND["all_reduce", dtype]


def _kind_of(operation: str, tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous() and tensor.is_cpu, "a stage group on CPU takes contiguous CPU tensors"
    assert tensor.dtype in _DTYPES, f"{tensor.dtype} is not exchanged between shards"
    return _KIND[operation, tensor.dtype]


def _sum_shards(shown: list[torch.Tensor], total: torch.Tensor) -> None:
    """Sum in shard order into `total`: every shard adds the same numbers in the same order."""
    if len(shown) > 2 and total.dtype in _LOW_PRECISION:
        in_float32 = shown[0].float()
        for theirs in shown[1:]:
            in_float32 += theirs
        total.copy_(in_float32)
    else:  # two low-precision numbers are added in float32 and rounded once by torch itself
        torch.add(shown[0], shown[1], out=total)
        for theirs in shown[2:]:
            total += theirs


def _aborted(words: memoryview) -> str:
    return f"it was aborted by shard {words[0] - 1}"


def _operation(description: int) -> str:
    nbytes, kind = divmod(description, MOST_KINDS)
    operation, dtype = _KINDS[kind]
    return f"{operation} of {nbytes} bytes {dtype}"
