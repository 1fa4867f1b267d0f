"""The all-reduce of small messages on CUDA: one kernel over memory that the shards' GPUs map into each other.

The kernels are torch's own (torch.ops.symm_mem); they reach the others' memory over NVLink. Other messages go to NCCL.
Unless its sums are right on every shard at start-up, NCCL does everything.

One buffer serves all messages, one after the other, also inside a CUDA graph: its address is fixed, nothing waits for
the host, and a kernel's signals are back at zero when it ends, so that it can be replayed. That no message overwrites
what a slower shard still reads follows from the kernels' closing barrier and from the order of the stream: each kernel
ends on a shard only once all shards have read, and what follows on the stream begins after that. So all all-reduces of
a group belong to one stream, or to streams that wait for each other; two that do not would deadlock anyway.

A kernel that waits for a dead neighbor cannot be aborted, unlike NCCL's: such a rank must be ended.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from cluster.collectives.interface import StageGroup, all_agree
from cluster.collectives.methods import BUFFER_BYTES, MOST_SHARDS, Method, StageLinks, method_for
from cluster.collectives.rendezvous import EpochStore

logger = logging.getLogger(__name__)

_ALIGNMENT_BYTES = 16  # at which a message begins: with less the kernels load less at once, or refuse


class SymmetricStage:
    """A StageGroup that sums small messages itself, and leaves the rest to another one over the same shards.

    All shards add in the same order, in the message's dtype (CUDASymmetricMemory-inl.h, load_and_reduce), or one adds
    for all: sums have the same bits.
    """

    can_abort = False

    def __init__(self, fallback: StageGroup, buffer: torch.Tensor, name: str, has_multicast: bool) -> None:
        """`buffer`: uint8 [BUFFER_BYTES], symmetric memory that all shards of the group `name` have met over."""
        self.size, self.shard = fallback.size, fallback.shard
        self._fallback = fallback
        self._buffers: dict[torch.dtype, torch.Tensor] = {
            dtype: buffer.view(dtype) for dtype in (torch.bfloat16, torch.float32)
        }
        self._name = name
        self._links = StageLinks(fallback.size, has_symmetric_memory=True, has_multicast=has_multicast)
        self._num_operations = 0

    @property
    def num_operations(self) -> int:
        """See StageGroup."""
        return self._num_operations + self._fallback.num_operations

    def method(self, tensor: torch.Tensor) -> Method:
        """The method by which a tensor is summed."""
        if tensor.dtype not in self._buffers or tensor.storage_offset() * tensor.itemsize % _ALIGNMENT_BYTES:
            return "nccl"
        return method_for(tensor.nbytes, self._links)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the shards → a new tensor, or the one given."""
        method = self.method(tensor)
        if method == "nccl":
            return self._fallback.all_reduce(tensor)
        self._num_operations += 1
        kernels: Any = torch.ops.symm_mem
        shared = self._buffers[tensor.dtype][: tensor.numel()].view(tensor.shape)
        if method == "one_shot":
            # It copies into the buffer, meets the others, sums into a tensor of its own, and meets them again
            total: torch.Tensor = kernels.one_shot_all_reduce_copy(shared, tensor, "sum", self._name)
            return total
        shared.copy_(tensor)
        sum_in_place = kernels.multimem_all_reduce_ if method == "multimem" else kernels.two_shot_all_reduce_
        sum_in_place(shared, "sum", self._name)
        return tensor.copy_(shared)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[*] of every shard → [size, *]."""
        return self._fallback.all_gather(tensor)

    def abort(self) -> None:
        """See StageGroup."""
        self._fallback.abort()

    def close(self) -> None:
        """See StageGroup."""
        self._buffers.clear()
        self._fallback.close()


def with_symmetric_memory(fallback: StageGroup, store: EpochStore, stage: int, device: torch.device) -> StageGroup:
    """A group that uses symmetric memory; or the one given, with the reason logged. All shards must call it.

    After each step that may fail on one shard alone, all shards vote on whether to go on.
    """
    if not 2 <= fallback.size <= MOST_SHARDS:
        logger.info(
            "all-reduces go through NCCL: symmetric memory is for 2 to %d shards, not %d", MOST_SHARDS, fallback.size
        )
        return fallback
    name = f"stagemesh-{store.epoch}-stage{stage}"  # torch keeps such names for the life of the process
    buffer = _attempt(functools.partial(_allocate, device))
    if not all_agree(fallback, buffer is not None, device):
        return fallback
    assert buffer is not None
    met = _attempt(functools.partial(_meet, buffer, name, fallback, store))
    if not all_agree(fallback, met is not None, device):
        return fallback
    assert met is not None
    group = SymmetricStage(fallback, buffer, name, has_multicast=bool(met.multicast_ptr))
    is_right = bool(_attempt(functools.partial(_check, group, device)))
    return group if all_agree(fallback, is_right, device) else fallback


def _allocate(device: torch.device) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric

    return symmetric.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)


def _meet(buffer: torch.Tensor, name: str, group: StageGroup, store: EpochStore) -> Any:
    """Map the buffers of all shards → torch's handle. Torch does not know our groups, so it gets rank and size here."""
    symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")
    symmetric._SymmetricMemory.set_group_info(name, group.shard, group.size, store.part(f"{name}/symmetric"))  # noqa: SLF001
    return symmetric.rendezvous(buffer, name)


def _check(group: SymmetricStage, device: torch.device) -> bool:
    """Raises RuntimeError where a sum is wrong. The numbers are small integers, which bfloat16 holds exactly.

    Not before all sums are done: the other shards would wait for this one in a kernel that cannot be aborted.
    """
    wrong: list[str] = []
    for dtype in (torch.bfloat16, torch.float32):
        for num_bytes in (_ALIGNMENT_BYTES, 64 * 1024, BUFFER_BYTES):
            count_N = torch.arange(num_bytes // dtype.itemsize, device=device) % 8
            total = group.all_reduce((count_N + group.shard).to(dtype))
            expected = count_N * group.size + group.size * (group.size - 1) // 2
            if not torch.equal(total.long(), expected):
                wrong.append(f"a sum of {num_bytes} bytes in {dtype} is wrong")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return True


def _attempt(work: Callable[[], Any]) -> Any:
    """The result of some work; None, with the reason logged, where it fails."""
    try:
        return work()
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
        logger.warning("all-reduces go through NCCL, not through symmetric memory: %s", error)
        return None
