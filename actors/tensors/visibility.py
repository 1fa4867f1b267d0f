"""Works out, once a step for all layers, which keys each token sees: groups of decode rows, tiles of prefill chunks."""

from dataclasses import dataclass

import torch

from actors.decisions.model_spec import Sight
from actors.tensors.attention import DecodeGroup, PrefillTile, StepAttention, Visibility

_TILE = 256  # queries of a prefill tile: its mask is [256, keys]
_KEYS_AT_ONCE = 1 << 17  # keys gathered for one group of decode rows, padding included


@dataclass(frozen=True)
class Chunk:
    """One sequence's tokens in a step."""

    table: int  # its row of the block tables
    row: int  # of its first token among the step's
    start: int  # position of its first token
    num_tokens: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.num_tokens


class VisibilityMaker:
    """Knows the sights of a rank's attentions, and makes masks in the dtype of its queries."""

    def __init__(self, block_size: int, sights: frozenset[Sight], dtype: torch.dtype, device: torch.device) -> None:
        self.block_size = block_size
        self.sights = sights
        self.dtype = dtype
        self.device = device

    def of_step(self, chunks: list[Chunk], tables: torch.Tensor) -> StepAttention:
        """Chunks in token order, those of one token first; `tables` int64 [rows, blocks], on the host."""
        slots = [self._slots(tables, chunk, chunk.start, chunk.end) for chunk in chunks]
        return StepAttention(
            slots_T=torch.cat(slots).to(self.device, non_blocking=True),
            by_sight={sight: self._visibility(chunks, tables, sight) for sight in self.sights},
        )

    def _visibility(self, chunks: list[Chunk], tables: torch.Tensor, sight: Sight) -> Visibility:
        rows = [chunk for chunk in chunks if chunk.num_tokens == 1]
        return Visibility(
            groups=tuple(self._group(rows[first:end], tables, sight) for first, end in self._similar(rows, sight)),
            tiles=tuple(
                self._tile(chunk, tables, first, min(first + _TILE, chunk.end), sight)
                for chunk in chunks[len(rows) :]
                for first in range(chunk.start, chunk.end, _TILE)
            ),
        )

    def _similar(self, rows: list[Chunk], sight: Sight) -> list[tuple[int, int]]:
        """Cut rows into runs: within one, tables are at most twice as long as the shortest, and not too many keys."""
        runs, first, shortest = [], 0, 0
        for i, row in enumerate(rows):
            num_blocks = row.start // self.block_size - sight.first_key(row.start) // self.block_size + 1
            num_keys = (i + 1 - first) * num_blocks * self.block_size
            if i > first and (num_blocks > 2 * shortest or num_keys > _KEYS_AT_ONCE):
                runs.append((first, i))
                first = i
            if i == first:
                shortest = num_blocks
        if rows:
            runs.append((first, len(rows)))
        return runs

    def _group(self, rows: list[Chunk], tables: torch.Tensor, sight: Sight) -> DecodeGroup:
        positions_B1 = torch.tensor([[row.start] for row in rows])
        first_keys_B1 = torch.tensor([[sight.first_key(row.start)] for row in rows])
        first_blocks_B1 = first_keys_B1 // self.block_size
        last_blocks_B1 = positions_B1 // self.block_size
        num_blocks = int((last_blocks_B1 - first_blocks_B1).max()) + 1
        # Padding repeats a row's own last block: nothing of another sequence, masked or not, enters its attention
        blocks_BN = torch.minimum(first_blocks_B1 + torch.arange(num_blocks), last_blocks_B1)
        tables_BN = tables[torch.tensor([[row.table] for row in rows]), blocks_BN]
        keys_BK = first_blocks_B1 * self.block_size + torch.arange(num_blocks * self.block_size)
        visible_BK = (keys_BK <= positions_B1) & (keys_BK >= first_keys_B1)
        return DecodeGroup(
            rows=slice(rows[0].row, rows[-1].row + 1),
            tables_BN=tables_BN.to(self.device, non_blocking=True),
            mask_B11K=self._mask(visible_BK)[:, None, None, :],
        )

    def _tile(self, chunk: Chunk, tables: torch.Tensor, first: int, end: int, sight: Sight) -> PrefillTile:
        first_key = sight.first_key(first)
        mask = None
        if first_key < first or sight.first_key(end - 1) > first:
            first_keys_T1 = torch.tensor([[sight.first_key(query)] for query in range(first, end)])
            keys_K = torch.arange(first_key, end)
            mask = self._mask((keys_K <= torch.arange(first, end)[:, None]) & (keys_K >= first_keys_T1))
        row = chunk.row + first - chunk.start
        slots_K = self._slots(tables, chunk, first_key, end).to(self.device, non_blocking=True)
        return PrefillTile(slice(row, row + end - first), slots_K, mask)

    def _slots(self, tables: torch.Tensor, chunk: Chunk, first: int, end: int) -> torch.Tensor:
        """Where the cache holds positions [first, end) of a sequence."""
        positions = torch.arange(first, end)
        return tables[chunk.table, positions // self.block_size] * self.block_size + positions % self.block_size

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Additive: 0 where visible, else -inf; made on the device from one byte an element."""
        on_device = visible.to(self.device, non_blocking=True)
        mask = torch.zeros(on_device.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~on_device, float("-inf"))
