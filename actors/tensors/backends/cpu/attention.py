"""Attention on CPU: single-token rows by kernels that read the blocks of the cache, prefill tiles in torch.

T tokens of the step · B rows, a token each · h heads · H KV heads · G queries to a KV head · D dimension of a key.
"""

from collections.abc import Sequence

import numpy as np
import torch

from actors.decisions.model.spec import AttentionSpec
from actors.tensors.attention import reference
from actors.tensors.attention.metadata import AttentionMetadata, CachedRows, LayerCache
from actors.tensors.attention.metadata_builder import AttentionMetadataBuilder
from actors.tensors.backend import Upload
from actors.tensors.backends.cpu import paged_attention, paged_attention_avx512
from actors.tensors.backends.cpu.kernels import DTYPE_TAGS, HeadRows, KeysValues
from actors.tensors.backends.cpu.paged_attention import AttentionSizes, RowTables
from actors.tensors.backends.reference import ReferenceAttention
from actors.tensors.backends.trial import Account

_NO_SINKS = np.zeros(0, np.float32)


class CPUAttention(ReferenceAttention):
    """See AttentionBackend. Kernels compute decode rows, and prompts up to a length."""

    def __init__(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int, upload: Upload) -> None:
        self.block_size = block_size
        reasons_not_avx512 = [paged_attention_avx512.why_not(spec, dtype, block_size) for spec in specs]
        self._kernels = {
            (spec.key_dim, spec.value_dim): (paged_attention if reason else paged_attention_avx512).attend_rows
            for spec, reason in zip(specs, reasons_not_avx512, strict=True)
        }
        mask_specs = frozenset(spec.mask_spec for spec in specs)
        super().__init__(
            AttentionMetadataBuilder(
                block_size,
                mask_specs,
                dtype,
                upload,
                reads_blocks=dtype in DTYPE_TAGS,
                longest_as_rows=paged_attention_avx512.LONGEST if not any(reasons_not_avx512) else 0,
            )
        )
        account = Account()
        for reason in reasons_not_avx512:
            account.put("paged_attention_avx512", reason)
        self.substitutions = account.entries()

    def attend(
        self,
        cache: LayerCache,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        visible = metadata.by_mask[cache.spec.mask_spec]
        if not any(isinstance(group, CachedRows) for group in visible.groups):
            return reference.attend(cache, query, metadata, scaling, sinks)
        num_kv_heads, value_dim = cache.values_NbHD.shape[2:]
        query_HGTD = query.view(num_kv_heads, -1, *query.shape[1:])
        out_THGD = query.new_empty(query.shape[1], *query_HGTD.shape[:2], value_dim)
        for group in visible.groups:
            assert isinstance(group, CachedRows), "either all rows are read by kernels, or none"
            self._attend_rows(cache, group, query[:, group.rows], scaling, sinks, out_THGD[group.rows])
        scores = reference.scores_of(scaling, cache.spec.softcap, sinks, num_kv_heads)
        for tile in visible.tiles:
            out_THGD[tile.rows] = reference.attend_tile(cache, tile, query_HGTD[:, :, tile.rows], scores)
        return out_THGD.flatten(1, 2)

    def _attend_rows(
        self,
        cache: LayerCache,
        rows: CachedRows,
        query_hBD: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
        out_BHGD: torch.Tensor,
    ) -> None:
        """Query [heads, B, D]; fills `out_BHGD`, which is contiguous."""
        if query_hBD.stride(2) != 1:
            query_hBD = query_hBD.contiguous()
        self._kernels[cache.spec.key_dim, cache.spec.value_dim](
            HeadRows(query_hBD.data_ptr(), query_hBD.stride(1), query_hBD.stride(0)),
            KeysValues(cache.keys_NbHD.data_ptr(), cache.values_NbHD.data_ptr()),
            out_BHGD.data_ptr(),
            tables_of(rows),
            _NO_SINKS if sinks is None else sinks.float().flatten().numpy(),
            sizes_of(cache, len(query_hBD), scaling),
            DTYPE_TAGS[query_hBD.dtype],
        )


def tables_of(rows: CachedRows) -> RowTables:
    """The rows in the form that the kernels take."""
    return RowTables(rows.tables, rows.table_of_B, rows.positions_B, rows.first_keys_B)


def sizes_of(cache: LayerCache, num_heads: int, scaling: float) -> AttentionSizes:
    """The sizes of an attention of `num_heads` query heads over this cache."""
    _, block_size, num_kv_heads, key_dim = cache.keys_NbHD.shape
    return AttentionSizes(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=cache.values_NbHD.shape[3],
        block_size=block_size,
        element_bytes=cache.keys_NbHD.element_size(),
        scaling=scaling,
        softcap=cache.spec.softcap or 0.0,
    )
