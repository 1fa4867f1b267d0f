"""Owns the paged KV cache of a rank: keys and values of its attentions, in blocks, and how many blocks fit."""

from collections.abc import Sequence
from pathlib import Path

import torch

from actors.decisions.model.shard_plan import AttentionShard


class KVCache:
    """Keys and values of each attention, [num_blocks, block_size, kv_heads, dimension], zeros at first."""

    def __init__(
        self,
        attentions: Sequence[AttentionShard],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(num_heads: int, dim: int) -> torch.Tensor:
            return torch.zeros(num_blocks, block_size, num_heads, dim, dtype=dtype, device=device)

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = [zeros(shard.num_kv_heads, shard.spec.key_dim) for shard in attentions]
        self.values = [zeros(shard.num_kv_heads, shard.spec.value_dim) for shard in attentions]

    @property
    def num_bytes(self) -> int:
        """What it takes of the device's memory."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero some blocks (int64 [n]) of every attention.

        A masked position still enters attention, with weight 0, and 0 × NaN is NaN: what a request left in a block
        must not reach the next one that holds it.
        """
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(0, blocks, 0)


def available_bytes(device: torch.device) -> int:
    """Memory that a process may still take on a device, in bytes: on CPU as the node and the container allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _available_on_node(Path("/proc/meminfo"))
    return max(0, min(available, _available_in_container(Path("/sys/fs/cgroup"), available)))


def _available_on_node(meminfo: Path) -> int:
    """The kernel's own estimate of what may be taken without swapping, in bytes (proc_meminfo(5))."""
    for line in meminfo.read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.removesuffix("kB")) * 1024
    raise RuntimeError(f"{meminfo} names no MemAvailable")


def _available_in_container(cgroup: Path, otherwise: int) -> int:
    """What the control group's limit leaves, in bytes; page cache that can be dropped counts as free.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return otherwise if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):  # no such file system here
        return otherwise
