"""Owns the paged KV cache of a rank: keys and values of its attentions, in blocks."""

from collections.abc import Sequence

import torch

from actors.decisions.model.shard_plan import AttentionShard
from actors.tensors.attention.metadata import LayerCache


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
        self.layers = [
            LayerCache(
                shard.spec,
                zeros(shard.num_kv_heads, shard.spec.key_dim),
                zeros(shard.num_kv_heads, shard.spec.value_dim),
            )
            for shard in attentions
        ]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of every attention."""
        return [tensor for layer in self.layers for tensor in (layer.keys_NbHD, layer.values_NbHD)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the device's memory that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def clear(self, blocks: torch.Tensor) -> None:
        """Zero some blocks (int64 [n]) of every attention.

        A masked position still enters attention with weight 0, and 0 × NaN is NaN: what one request left in a block
        must not reach the next request that gets the block.
        """
        for tensor in self.tensors:
            tensor.index_fill_(0, blocks, 0)
