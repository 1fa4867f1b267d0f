"""Builds the attention metadata, once a step for all layers: groups of decode rows, tiles of prefill chunks."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from actors.decisions.model.spec import MaskSpec
from actors.tensors.attention.metadata import (
    AttentionMetadata,
    CachedRows,
    Chunk,
    DecodeGroup,
    Indices,
    LogitsRows,
    PrefillTile,
    StepLayout,
    VisibleKeys,
    positions_of,
)
from actors.tensors.attention.reference import own_blocks

_TILE = 256  # queries of a prefill tile: its mask is [256, keys]
_KEYS_AT_ONCE = 1 << 17  # keys gathered for one group of decode rows, padding included


@dataclass(frozen=True)
class _Tokens:
    """A step's tokens: the block tables, the row of each token's table, and its position."""

    tables: Indices
    table_of_T: Indices
    positions_T: Indices

    def cached(self, rows: slice, which: "slice | Indices", mask_spec: MaskSpec) -> CachedRows:
        """Some of the tokens, by index, as the rows `rows`."""
        positions = self.positions_T[which]
        return CachedRows(rows, self.tables, self.table_of_T[which], positions, mask_spec.first_key(positions))


class AttentionMetadataBuilder:
    """Knows the masks of a rank's attentions, and builds additive masks in the dtype of its queries."""

    def __init__(
        self,
        block_size: int,
        mask_specs: frozenset[MaskSpec],
        dtype: torch.dtype,
        upload: Callable[[torch.Tensor], torch.Tensor],
        reads_blocks: bool = False,
        longest_as_rows: int = 0,
    ) -> None:
        """`reads_blocks`: a kernel reads single-token rows' keys from the cache, so that none is padded or masked.

        Chunks that end at position `longest_as_rows` or earlier are then given to it token by token.
        """
        self.block_size = block_size
        self.mask_specs = mask_specs
        self.dtype = dtype
        self.upload = upload
        self.reads_blocks = reads_blocks
        self.longest_as_rows = longest_as_rows if reads_blocks else 0

    def build(self, layout: StepLayout) -> AttentionMetadata:
        """The metadata of one step."""
        chunks, tables = layout.chunks, layout.tables
        positions_T, counts = positions_of(chunks), [chunk.num_tokens for chunk in chunks]
        table_of_T = np.repeat([chunk.table for chunk in chunks], counts)
        tokens = _Tokens(tables.numpy(), table_of_T, positions_T)
        blocks_T = tokens.tables[table_of_T, positions_T // self.block_size]
        slots_T = blocks_T * self.block_size + positions_T % self.block_size
        return AttentionMetadata(
            slots_T=self.upload(torch.from_numpy(slots_T)),
            by_mask={mask_spec: self._visible_keys(chunks, tables, tokens, mask_spec) for mask_spec in self.mask_specs},
            logits_rows=None if layout.logits_rows is None else self._logits_rows(tokens, layout.logits_rows),
        )

    def _logits_rows(self, tokens: "_Tokens", logits_rows: list[int]) -> LogitsRows | None:
        if not self.longest_as_rows or len(logits_rows) >= len(tokens.table_of_T):
            return None
        rows_Q, rows = np.array(logits_rows, np.int64), slice(0, len(logits_rows))
        by_mask = {mask_spec: tokens.cached(rows, rows_Q, mask_spec) for mask_spec in self.mask_specs}
        return LogitsRows(torch.from_numpy(rows_Q), by_mask)

    def _visible_keys(
        self, chunks: list[Chunk], tables: torch.Tensor, tokens: "_Tokens", mask_spec: MaskSpec
    ) -> VisibleKeys:
        groups: list[DecodeGroup | CachedRows] = []
        tiles: list[PrefillTile] = []
        for are_rows, neighbors in itertools.groupby(chunks, self._are_rows):
            run = list(neighbors)
            if not are_rows:
                tiles += [
                    self._tile(chunk, tables, first, min(first + _TILE, chunk.end), mask_spec)
                    for chunk in run
                    for first in range(chunk.start, chunk.end, _TILE)
                ]
            elif self.reads_blocks:
                rows = slice(run[0].row, run[-1].row + run[-1].num_tokens)
                groups.append(tokens.cached(rows, rows, mask_spec))
            else:
                groups += self._grouped(run, tables, mask_spec)
        return VisibleKeys(tuple(groups), tuple(tiles))

    def _are_rows(self, chunk: Chunk) -> bool:
        return chunk.num_tokens == 1 or chunk.end <= self.longest_as_rows

    def _grouped(self, rows: list[Chunk], tables: torch.Tensor, mask_spec: MaskSpec) -> list[DecodeGroup]:
        return [self._group(rows[first:end], tables, mask_spec) for first, end in self._similar(rows, mask_spec)]

    def _similar(self, rows: list[Chunk], mask_spec: MaskSpec) -> list[tuple[int, int]]:
        """Cut rows into runs [first, end) of few enough keys, no table longer than twice the shortest of its run."""
        runs, first, shortest = [], 0, 0
        for i, row in enumerate(rows):
            num_blocks = row.start // self.block_size - mask_spec.first_key(row.start) // self.block_size + 1
            num_keys = (i + 1 - first) * num_blocks * self.block_size
            if i > first and (num_blocks > 2 * shortest or num_keys > _KEYS_AT_ONCE):
                runs.append((first, i))
                first = i
            if i == first:
                shortest = num_blocks
        runs.append((first, len(rows)))
        return runs

    def _group(self, rows: list[Chunk], tables: torch.Tensor, mask_spec: MaskSpec) -> DecodeGroup:
        positions_B1 = torch.tensor([[row.start] for row in rows])
        first_keys_B1 = mask_spec.first_key(positions_B1)
        first_blocks_B1 = first_keys_B1 // self.block_size
        last_blocks_B1 = positions_B1 // self.block_size
        num_blocks = int((last_blocks_B1 - first_blocks_B1).max()) + 1
        blocks_BN = own_blocks(first_blocks_B1, last_blocks_B1, num_blocks)
        tables_BN = tables[torch.tensor([[row.table] for row in rows]), blocks_BN]
        keys_BK = first_blocks_B1 * self.block_size + torch.arange(num_blocks * self.block_size)
        visible_BK = (keys_BK <= positions_B1) & (keys_BK >= first_keys_B1)
        return DecodeGroup(
            rows=slice(rows[0].row, rows[-1].row + 1),
            tables_BN=self.upload(tables_BN),
            mask_B11K=self._mask(visible_BK)[:, None, None, :],
        )

    def _tile(self, chunk: Chunk, tables: torch.Tensor, first: int, end: int, mask_spec: MaskSpec) -> PrefillTile:
        first_key = mask_spec.first_key(first)
        mask = None
        if first_key < first or mask_spec.first_key(end - 1) > first:
            queries_T1, keys_K = torch.arange(first, end)[:, None], torch.arange(first_key, end)
            mask = self._mask((keys_K <= queries_T1) & (keys_K >= mask_spec.first_key(queries_T1)))
        row = chunk.row + first - chunk.start
        slots_K = self.upload(self._slots(tables, chunk, first_key, end))
        return PrefillTile(slice(row, row + end - first), slots_K, mask)

    def _slots(self, tables: torch.Tensor, chunk: Chunk, first: int, end: int) -> torch.Tensor:
        """The slots of positions [first, end) of a sequence."""
        positions = torch.arange(first, end)
        return tables[chunk.table, positions // self.block_size] * self.block_size + positions % self.block_size

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """An additive mask, 0 where visible, else -inf; made on the device, so that one byte an element is uploaded."""
        on_device = self.upload(visible)
        mask = torch.zeros(on_device.shape, dtype=self.dtype, device=on_device.device)
        return mask.masked_fill_(~on_device, float("-inf"))
