"""Attention in plain torch, for any device: the reference for every kernel, and what runs where there is no kernel.

T tokens of the step · B rows, a token each · S sequences · K keys · N blocks of a table · P slots of the cache ·
h heads · H KV heads · G queries to a KV head · D dimension of a key (of a value: the attention's own).
"""

from typing import NamedTuple

import torch
from torch import nn

from actors.decisions.model.spec import MaskSpec
from actors.tensors.attention.metadata import AttentionMetadata, DecodeGroup, LayerCache, PagedRows, PrefillTile


class Scores(NamedTuple):
    """How an attention turns the products of queries and keys into weights."""

    scaling: float
    softcap: float | None
    sinks_HG: torch.Tensor | None  # a further logit of each head, which takes weight and gives no value

    @property
    def are_plain(self) -> bool:
        """Whether torch's scaled_dot_product_attention computes them."""
        return self.softcap is None and self.sinks_HG is None

    def sinks(self, num_dims: int) -> torch.Tensor | None:
        """The sinks [H, G, 1, ...] with `num_dims` dimensions behind the heads'."""
        return None if self.sinks_HG is None else self.sinks_HG[(..., *[None] * num_dims)]

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[*, Q, D], [*, K, D], [*, K, value D], an additive mask and sinks [*, Q, 1] → [*, Q, value D]."""
        logits = (query @ keys.transpose(-1, -2)).float() * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits + mask
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().expand(*logits.shape[:-1], 1)], dim=-1)
        weights = logits.softmax(dim=-1)[..., : keys.shape[-2]]
        return weights.to(query.dtype) @ values


def scores_of(scaling: float, softcap: float | None, sinks: torch.Tensor | None, num_kv_heads: int) -> Scores:
    """The Scores of an attention; `sinks` [heads], or None."""
    return Scores(scaling, softcap, None if sinks is None else sinks.view(num_kv_heads, -1))


def own_blocks(first_blocks_B1: torch.Tensor, last_blocks_B1: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The columns of its block table that each row reads [B, N]: N = `num_blocks` from its first block on.

    Behind its last block a row reads that block again. A block of another sequence must not enter its attention, even
    masked: 0 × NaN is NaN.
    """
    return torch.minimum(first_blocks_B1 + torch.arange(num_blocks, device=first_blocks_B1.device), last_blocks_B1)


def gather_blocks(cache_NbHD: torch.Tensor, tables_BN: torch.Tensor) -> torch.Tensor:
    """Gather the blocks of each row → [B, H, K, D], a view of one copy."""
    _, _, num_heads, head_dim = cache_NbHD.shape
    gathered = cache_NbHD.index_select(0, tables_BN.flatten())
    return gathered.view(tables_BN.shape[0], -1, num_heads, head_dim).transpose(1, 2)


def write(cache: LayerCache, key_HTD: torch.Tensor, value_HTD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Write the step's keys and values into their slots of the cache."""
    keys_PHD, values_PHD = cache.keys_NbHD.flatten(0, 1), cache.values_NbHD.flatten(0, 1)
    assert key_HTD.shape[0] == keys_PHD.shape[1], f"{key_HTD.shape[0]} KV heads, {keys_PHD.shape[1]} in the cache"
    keys_PHD.index_copy_(0, slots_T, key_HTD.transpose(0, 1))
    values_PHD.index_copy_(0, slots_T, value_HTD.transpose(0, 1))


def attend(
    cache: LayerCache,
    query_hTD: torch.Tensor,
    metadata: AttentionMetadata,
    scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Query [heads, T, D] over the cache, which holds the step's own keys already → [T, heads, value D]."""
    num_kv_heads, value_dim = cache.values_NbHD.shape[2:]
    query_HGTD = query_hTD.view(num_kv_heads, -1, *query_hTD.shape[1:])
    out_THGD = query_hTD.new_empty(query_hTD.shape[1], *query_HGTD.shape[:2], value_dim)
    scores = scores_of(scaling, cache.spec.softcap, sinks, num_kv_heads)
    visible = metadata.by_mask[cache.spec.mask_spec]
    for group in visible.groups:
        assert isinstance(group, DecodeGroup), "CachedRows are for kernels"
        query_BHGD = query_HGTD[:, :, group.rows].permute(2, 0, 1, 3)
        out_THGD[group.rows] = attend_group(cache, group, query_BHGD, scores)
    for tile in visible.tiles:
        out_THGD[tile.rows] = attend_tile(cache, tile, query_HGTD[:, :, tile.rows], scores)
    return out_THGD.flatten(1, 2)


def attend_group(cache: LayerCache, group: DecodeGroup, query_BHGD: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Rows of one token each → [B, H, G, value D].

    A row's G queries to a KV head take the dimension that usually holds a sequence's tokens: keys are read once for all
    of them, and not repeated in memory.
    """
    keys_BHKD = gather_blocks(cache.keys_NbHD, group.tables_BN)
    values_BHKD = gather_blocks(cache.values_NbHD, group.tables_BN)
    if scores.are_plain:
        return nn.functional.scaled_dot_product_attention(
            query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K, scale=scores.scaling
        )
    return scores.attend(query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K, scores.sinks(1))


def attend_tile(cache: LayerCache, tile: PrefillTile, query_HGTD: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Neighboring tokens of one sequence → [T, H, G, value D]."""
    num_groups = query_HGTD.shape[1]
    keys_HKD = cache.keys_NbHD.flatten(0, 1).index_select(0, tile.slots_K).transpose(0, 1)
    values_HKD = cache.values_NbHD.flatten(0, 1).index_select(0, tile.slots_K).transpose(0, 1)
    # Views: KV heads are not repeated in memory
    keys_HGKD = keys_HKD.unsqueeze(1).expand(-1, num_groups, -1, -1)
    values_HGKD = values_HKD.unsqueeze(1).expand(-1, num_groups, -1, -1)
    if scores.are_plain:
        out_HGTD = nn.functional.scaled_dot_product_attention(
            query_HGTD, keys_HGKD, values_HGKD, tile.mask_TK, is_causal=tile.mask_TK is None, scale=scores.scaling
        )
    else:
        mask_TK = tile.mask_TK
        if mask_TK is None:
            num_tokens = query_HGTD.shape[2]
            mask_TK = query_HGTD.new_full((num_tokens, num_tokens), float("-inf")).triu(1)
        out_HGTD = scores.attend(query_HGTD, keys_HGKD, values_HGKD, mask_TK, scores.sinks(2))
    return out_HGTD.permute(2, 0, 1, 3)


def attend_whole_tables(
    cache: LayerCache, query_BhD: torch.Tensor, rows: PagedRows, scaling: float, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of one token each, over whole block tables, whatever their lengths → [B, heads, value D].

    All shapes follow from the tables', and nothing waits for the device, so that a CUDA graph can hold it.
    """
    block_size, num_kv_heads = cache.keys_NbHD.shape[1:3]
    scores = scores_of(scaling, cache.spec.softcap, sinks, num_kv_heads)
    positions_B1 = rows.lengths_S.long().unsqueeze(1) - 1
    blocks_BN = own_blocks(torch.zeros_like(positions_B1), positions_B1 // block_size, rows.tables_SN.shape[1])
    own_BN = rows.tables_SN.long().gather(1, blocks_BN)
    query_BHGD = query_BhD.reshape(len(query_BhD), num_kv_heads, -1, query_BhD.shape[2])
    mask_B11K = _mask(cache.spec.mask_spec, positions_B1, own_BN.shape[1] * block_size)[:, None, None, :]
    keys_BHKD, values_BHKD = (gather_blocks(cached, own_BN) for cached in (cache.keys_NbHD, cache.values_NbHD))
    return scores.attend(query_BHGD, keys_BHKD, values_BHKD, mask_B11K, scores.sinks(1)).flatten(1, 2)


def _mask(mask_spec: MaskSpec, positions_B1: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Additive, float32 [B, K]: 0 where a row sees a key, else -inf."""
    keys_K = torch.arange(num_keys, device=positions_B1.device)
    is_seen_BK = (keys_K <= positions_B1) & (keys_K >= mask_spec.first_key(positions_B1))
    return torch.zeros(is_seen_BK.shape, device=positions_B1.device).masked_fill_(~is_seen_BK, float("-inf"))
