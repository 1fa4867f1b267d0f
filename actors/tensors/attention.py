"""The attention of every layer: writes new keys and values into the paged cache, then attends through block tables.

T tokens of the step · B decode rows · K keys seen · N blocks of a table · H KV heads · G queries to a KV head ·
D head dimension · S slots of the cache (block × block size + offset).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
    """Who sees what, for all layers of one window."""

    groups: tuple[DecodeGroup, ...]
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True)
class StepAttention:
    """What attention must know about one step."""

    slots_T: torch.Tensor  # int64: where each token's key and value go
    by_window: dict[int | None, Visibility]


class CurrentStep:
    """The step that runs now; one object, shared by all layers of a rank."""

    attention: StepAttention | None = None


class LayerAttention:
    """One layer's part of the cache, its window, and the step that runs now."""

    def __init__(
        self, keys_NbHD: torch.Tensor, values_NbHD: torch.Tensor, window: int | None, current: CurrentStep
    ) -> None:
        self.keys_NbHD = keys_NbHD
        self.values_NbHD = values_NbHD
        self.keys_SHD = keys_NbHD.flatten(0, 1)
        self.values_SHD = values_NbHD.flatten(0, 1)
        self.window = window
        self.current = current

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Query [heads, T, D], key and value [H, T, D] of the step's tokens → [T, heads, D]."""
        step = self.current.attention
        assert step is not None, "no step is set"
        self.keys_SHD.index_copy_(0, step.slots_T, key.transpose(0, 1))
        self.values_SHD.index_copy_(0, step.slots_T, value.transpose(0, 1))
        query_THGD = query.transpose(0, 1).reshape(query.shape[1], key.shape[0], -1, query.shape[2])
        out_THGD = query.new_empty(query_THGD.shape)
        visibility = step.by_window[self.window]
        for group in visibility.groups:
            out_THGD[group.rows] = self._decode(group, query_THGD[group.rows], scaling)
        for tile in visibility.tiles:
            out_THGD[tile.rows] = self._prefill(tile, query_THGD[tile.rows], scaling)
        return out_THGD.flatten(1, 2)

    def _decode(self, group: DecodeGroup, query_BHGD: torch.Tensor, scaling: float) -> torch.Tensor:
        # A row's G queries to a KV head stand where a sequence's tokens usually stand: keys are read once for all of
        # them and never repeated.
        keys_BHKD = _gather(self.keys_NbHD, group.tables_BN)
        values_BHKD = _gather(self.values_NbHD, group.tables_BN)
        return nn.functional.scaled_dot_product_attention(
            query_BHGD, keys_BHKD, values_BHKD, group.mask_B11K, scale=scaling
        )

    def _prefill(self, tile: PrefillTile, query_THGD: torch.Tensor, scaling: float) -> torch.Tensor:
        query_HGTD = query_THGD.permute(1, 2, 0, 3)
        num_groups = query_HGTD.shape[1]
        keys_HKD = self.keys_SHD.index_select(0, tile.slots_K).transpose(0, 1)
        values_HKD = self.values_SHD.index_select(0, tile.slots_K).transpose(0, 1)
        out_HGTD = nn.functional.scaled_dot_product_attention(
            query_HGTD,
            keys_HKD.unsqueeze(1).expand(-1, num_groups, -1, -1),  # a view: KV heads are not repeated in memory
            values_HKD.unsqueeze(1).expand(-1, num_groups, -1, -1),
            tile.mask_TK,
            is_causal=tile.mask_TK is None,
            scale=scaling,
        )
        return out_HGTD.permute(2, 0, 1, 3)


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
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query [1, heads, T, D], key and value [1, H, T, D] → ([1, T, heads, D], None).

    What the step is and where the cache lies come from the module's own attribute, not through the model's arguments.
    Anything that would change the result and is not built fails here, loudly.
    """
    layer = getattr(module, MODULE_ATTRIBUTE)
    assert isinstance(layer, LayerAttention)
    assert attention_mask is None
    assert dropout == 0.0
    assert sliding_window in (None, layer.window), (sliding_window, layer.window)
    for name in ("softcap", "s_aux", "position_bias"):
        assert kwargs.get(name) is None, name
    assert scaling is not None
    return layer.attend(query[0], key[0], value[0], scaling).unsqueeze(0), None
