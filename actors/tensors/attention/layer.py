"""The attention of every layer: writes new keys and values into the paged cache, then attends through block tables.

T tokens of the step · B rows, a token each · K keys seen · N blocks of a table · H KV heads · G queries to a KV head ·
D dimension of a key (of a value: the attention's own) · S slots of the cache (block × block size + offset).
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.backends.cpu import kernels
from actors.tensors.backends.cpu import paged_attention_avx512 as dot_attention
from actors.tensors.backends.cuda.attention import PagedAttention, PagedRows

ATTENTION_NAME = "stagemesh"  # free of the substrings that Transformers dispatches on (flash, sdpa, paged|, /)
MODULE_ATTRIBUTE = "stagemesh_layer"  # where a model's attention module carries its LayerAttention
Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
_NO_SINKS = np.zeros(0, np.float32)


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one token each, of similar length: attended together through their block tables."""

    rows: slice  # of the step's tokens
    tables_BN: torch.Tensor  # int64; padded with a block of the same sequence
    mask_B11K: torch.Tensor  # additive, 0 or -inf, K = N × block size


@dataclass(frozen=True)
class CachedRows:
    """Rows of one token each, of any length: a kernel reads their keys where they lie in the cache."""

    rows: slice  # of the step's tokens, or of those that are asked for
    tables: Indices  # [sequences, blocks]
    places_B: Indices  # each row's sequence in the tables
    positions_B: Indices  # of the last key that it sees
    first_keys_B: Indices  # and of the first


@dataclass(frozen=True)
class PrefillTile:
    """Neighbouring tokens of one sequence, and the keys that any of them sees."""

    rows: slice  # of the step's tokens
    slots_K: torch.Tensor  # int64
    mask_TK: torch.Tensor | None  # additive; None: the tile's own keys only, plainly causal


@dataclass(frozen=True)
class Visibility:
    """Who sees what, for all attentions of one mask_spec."""

    groups: tuple[DecodeGroup | CachedRows, ...]
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True)
class LogitsRows:
    """Those of a step's tokens whose logits are asked for: no others are needed behind the last layer's keys."""

    rows_Q: torch.Tensor  # int64, among the tokens
    by_mask: dict[MaskSpec, CachedRows]


@dataclass(frozen=True)
class StepAttention:
    """What attention must know about one step."""

    slots_T: torch.Tensor  # int64: where each token's key and value go
    by_mask: dict[MaskSpec, Visibility]
    asked: LogitsRows | None = None  # None: all of them
    rows: PagedRows | None = None  # for those attentions that read block tables themselves


class CurrentStep:
    """The step that runs now; one object, shared by all layers of a rank."""

    attention: StepAttention | None = None


class LayerAttention:
    """One attention's part of the cache, what it is, and the step that runs now."""

    paged: PagedAttention | None = None  # what reads block tables itself, where the device has such a thing

    def __init__(
        self, spec: AttentionSpec, keys_NbHD: torch.Tensor, values_NbHD: torch.Tensor, current: CurrentStep
    ) -> None:
        self.spec = spec
        self.keys_NbHD = keys_NbHD
        self.values_NbHD = values_NbHD
        self.keys_SHD = keys_NbHD.flatten(0, 1)
        self.values_SHD = values_NbHD.flatten(0, 1)
        self.current = current
        block_size, key_dim, value_dim = keys_NbHD.shape[1], keys_NbHD.shape[3], values_NbHD.shape[3]
        self.has_dot = dot_attention.suits(keys_NbHD.dtype, keys_NbHD.device, block_size, key_dim, value_dim)
        self._attend_decode = dot_attention.attend_decode if self.has_dot else kernels.attend_decode

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [heads, T, D], key and value [H, T, D] of the step's tokens, sinks [heads] → [T, heads, value D]."""
        step = self.current.attention
        assert step is not None, "no step is set"
        assert key.shape[0] == self.keys_SHD.shape[1], f"{key.shape[0]} KV heads, {self.keys_SHD.shape[1]} in the cache"
        self.keys_SHD.index_copy_(0, step.slots_T, key.transpose(0, 1))
        self.values_SHD.index_copy_(0, step.slots_T, value.transpose(0, 1))
        return self.attend_stored(query, scaling, sinks)

    def attend_stored(self, query: torch.Tensor, scaling: float, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Query [heads, T, D], once the step's keys and values are in the cache → [T, heads, value D]."""
        step = self.current.attention
        assert step is not None, "no step is set"
        num_kv_heads, value_dim = self.values_SHD.shape[1:]
        if step.rows is not None and self.paged is not None and self.paged.takes(step.rows):
            return self.paged.attend(query.transpose(0, 1), self.keys_NbHD, self.values_NbHD, step.rows, scaling, sinks)
        query_HGTD = query.view(num_kv_heads, -1, *query.shape[1:])
        out_THGD = query.new_empty(query.shape[1], *query_HGTD.shape[:2], value_dim)
        scores = Scores(scaling, self.spec.softcap, None if sinks is None else sinks.view(num_kv_heads, -1))
        visibility = step.by_mask[self.spec.mask_spec]
        for group in visibility.groups:
            if isinstance(group, CachedRows):
                self._decode_cached(group, query[:, group.rows], scores, out_THGD[group.rows])
            else:
                query_BHGD = query_HGTD[:, :, group.rows].permute(2, 0, 1, 3)
                out_THGD[group.rows] = self._decode(group, query_BHGD, scores)
        for tile in visibility.tiles:
            out_THGD[tile.rows] = self._prefill(tile, query_HGTD[:, :, tile.rows], scores)
        return out_THGD.flatten(1, 2)

    def _decode_cached(
        self, group: CachedRows, query_hBD: torch.Tensor, scores: "Scores", out_BHGD: torch.Tensor
    ) -> None:
        """Query [heads, B, D]; fills `out_BHGD`, which is contiguous."""
        if query_hBD.stride(2) != 1:
            query_hBD = query_hBD.contiguous()
        sinks = _NO_SINKS if scores.sinks_HG is None else scores.sinks_HG.float().flatten().numpy()
        _, block_size, num_kv_heads, key_dim = self.keys_NbHD.shape
        self._attend_decode(
            (query_hBD.data_ptr(), self.keys_NbHD.data_ptr(), self.values_NbHD.data_ptr(), out_BHGD.data_ptr()),
            (group.tables, group.places_B, group.positions_B, group.first_keys_B),
            sinks,
            (len(query_hBD), num_kv_heads, key_dim, out_BHGD.shape[3], block_size, query_hBD.element_size()),
            (query_hBD.stride(1), query_hBD.stride(0)),
            scores.scaling,
            scores.softcap or 0.0,
            kernels.DTYPE_TAGS[query_hBD.dtype],
        )

    def _decode(self, group: DecodeGroup, query_BHGD: torch.Tensor, scores: "Scores") -> torch.Tensor:
        # A row's G queries to a KV head stand where a sequence's tokens usually stand: keys are read once for all of
        # them and never repeated.
        keys_BHKD = _gather(self.keys_NbHD, group.tables_BN)
        values_BHKD = _gather(self.values_NbHD, group.tables_BN)
        if scores.are_plain:
            return nn.functional.scaled_dot_product_attention(
                query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K, scale=scores.scaling
            )
        sinks_HG1 = None if scores.sinks_HG is None else scores.sinks_HG.unsqueeze(-1)
        return scores.attend(query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K, sinks_HG1)

    def _prefill(self, tile: PrefillTile, query_HGTD: torch.Tensor, scores: "Scores") -> torch.Tensor:
        num_groups = query_HGTD.shape[1]
        keys_HKD = self.keys_SHD.index_select(0, tile.slots_K).transpose(0, 1)
        values_HKD = self.values_SHD.index_select(0, tile.slots_K).transpose(0, 1)
        # Views: KV heads are not repeated in memory
        keys_HGKD = keys_HKD.unsqueeze(1).expand(-1, num_groups, -1, -1)
        values_HGKD = values_HKD.unsqueeze(1).expand(-1, num_groups, -1, -1)
        if scores.are_plain:
            out_HGTD = nn.functional.scaled_dot_product_attention(
                query_HGTD,
                keys_HGKD,
                values_HGKD,
                tile.mask_TK,
                is_causal=tile.mask_TK is None,
                scale=scores.scaling,
            )
        else:
            mask_TK = tile.mask_TK
            if mask_TK is None:
                num_tokens = query_HGTD.shape[2]
                mask_TK = query_HGTD.new_full((num_tokens, num_tokens), float("-inf")).triu(1)
            sinks_HG11 = None if scores.sinks_HG is None else scores.sinks_HG[..., None, None]
            out_HGTD = scores.attend(query_HGTD, keys_HGKD, values_HGKD, mask_TK, sinks_HG11)
        return out_HGTD.permute(2, 0, 1, 3)


@dataclass(frozen=True)
class Scores:
    """How an attention turns products of queries and keys into weights."""

    scaling: float
    softcap: float | None
    sinks_HG: torch.Tensor | None  # a logit beside the keys' that takes weight and gives no value

    @property
    def are_plain(self) -> bool:
        """Whether torch's own attention computes them."""
        return self.softcap is None and self.sinks_HG is None

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Written out, for what torch's does not have: [*, Q, D], [*, K, D], an additive mask and sinks [*, Q, 1]."""
        logits = (query @ keys.transpose(-1, -2)).float() * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits + mask
        if sinks is not None:
            beside = sinks.float().expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, beside], dim=-1)
        weights = logits.softmax(dim=-1)[..., : keys.shape[-2]]
        return weights.to(query.dtype) @ values


def _gather(cache_NbHD: torch.Tensor, tables_BN: torch.Tensor) -> torch.Tensor:
    """What lies in the blocks of each row, as a view [B, H, K, D] of one copy."""
    _, _, num_heads, head_dim = cache_NbHD.shape
    gathered = cache_NbHD.index_select(0, tables_BN.flatten())
    return gathered.view(tables_BN.shape[0], -1, num_heads, head_dim).transpose(1, 2)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query [1, heads, T, D], key and value [1, H, T, D] → ([1, T, heads, D], None).

    What the step is and where the cache lies come from the module's own attribute, not through the model's arguments.
    What the probe saw this module hand over is what comes; anything else fails here, loudly.
    """
    layer = getattr(module, MODULE_ATTRIBUTE)
    assert isinstance(layer, LayerAttention)
    assert attention_mask is None
    assert dropout == 0.0
    assert (softcap, s_aux is not None) == (layer.spec.softcap, layer.spec.has_sinks)
    if scaling is None:  # as Transformers' own functions take it
        scaling = query.shape[-1] ** -0.5
    return layer.attend(query[0], key[0], value[0], scaling, s_aux).unsqueeze(0), None
