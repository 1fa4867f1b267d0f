"""The attention of every layer: writes new keys and values into the paged cache, then attends through block tables.

T tokens of the step · B decode rows · K keys seen · N blocks of a table · H KV heads · G queries to a KV head ·
D dimension of a key (of a value: the attention's own) · S slots of the cache (block × block size + offset).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actors.decisions.model_spec import AttentionSpec, Sight

ATTENTION_NAME = "stagemesh"  # free of the substrings that Transformers dispatches on (flash, sdpa, paged|, /)
MODULE_ATTRIBUTE = "stagemesh_layer"  # where a model's attention module carries its LayerAttention


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one token each, of similar length: attended together through their block tables."""

    rows: slice  # of the step's tokens
    tables_BN: torch.Tensor  # int64; padded with a block of the same sequence
    mask_B11K: torch.Tensor  # additive, 0 or -inf, K = N × block size


@dataclass(frozen=True)
class PrefillTile:
    """Neighbouring tokens of one sequence, and the keys that any of them sees."""

    rows: slice  # of the step's tokens
    slots_K: torch.Tensor  # int64
    mask_TK: torch.Tensor | None  # additive; None: the tile's own keys only, plainly causal


@dataclass(frozen=True)
class Visibility:
    """Who sees what, for all attentions of one sight."""

    groups: tuple[DecodeGroup, ...]
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True)
class StepAttention:
    """What attention must know about one step."""

    slots_T: torch.Tensor  # int64: where each token's key and value go
    by_sight: dict[Sight, Visibility]


class CurrentStep:
    """The step that runs now; one object, shared by all layers of a rank."""

    attention: StepAttention | None = None


class LayerAttention:
    """One attention's part of the cache, what it is, and the step that runs now."""

    def __init__(
        self, spec: AttentionSpec, keys_NbHD: torch.Tensor, values_NbHD: torch.Tensor, current: CurrentStep
    ) -> None:
        self.spec = spec
        self.keys_NbHD = keys_NbHD
        self.values_NbHD = values_NbHD
        self.keys_SHD = keys_NbHD.flatten(0, 1)
        self.values_SHD = values_NbHD.flatten(0, 1)
        self.current = current
        # 32 rows of 112 keys on one such core: 0.43 ms by torch's own attention, 0.24 ms multiplied; without: 1.4 and 8
        self._multiplies_bf16 = (keys_NbHD.device.type, keys_NbHD.dtype) == (
            "cpu",
            torch.bfloat16,
        ) and torch.cpu.get_capabilities().get("avx512_bf16", False)

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
        query_THGD = query.transpose(0, 1).reshape(query.shape[1], key.shape[0], -1, query.shape[2])
        out_THGD = query.new_empty(*query_THGD.shape[:3], value.shape[2])
        scores = Scores(scaling, self.spec.softcap, None if sinks is None else sinks.view(key.shape[0], -1))
        visibility = step.by_sight[self.spec.sight]
        for group in visibility.groups:
            out_THGD[group.rows] = self._decode(group, query_THGD[group.rows], scores)
        for tile in visibility.tiles:
            out_THGD[tile.rows] = self._prefill(tile, query_THGD[tile.rows], scores)
        return out_THGD.flatten(1, 2)

    def _decode(self, group: DecodeGroup, query_BHGD: torch.Tensor, scores: "Scores") -> torch.Tensor:
        # A row's G queries to a KV head stand where a sequence's tokens usually stand: keys are read once for all of
        # them and never repeated.
        keys_BHKD = _gather(self.keys_NbHD, group.tables_BN)
        values_BHKD = _gather(self.values_NbHD, group.tables_BN)
        if scores.are_plain and self._multiplies_bf16 and query_BHGD.shape[0] > 1:
            # torch's own attention widens all it reads; the processor's bf16 products want each head's rows together
            keys_BHKD, values_BHKD = keys_BHKD.contiguous(), values_BHKD.contiguous()
            return scores.attend(query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K)
        if scores.are_plain:
            return nn.functional.scaled_dot_product_attention(
                query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K, scale=scores.scaling
            )
        sinks_HG1 = None if scores.sinks_HG is None else scores.sinks_HG.unsqueeze(-1)
        return scores.attend(query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K, sinks_HG1)

    def _prefill(self, tile: PrefillTile, query_THGD: torch.Tensor, scores: "Scores") -> torch.Tensor:
        query_HGTD = query_THGD.permute(1, 2, 0, 3)
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
