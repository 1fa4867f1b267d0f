"""Works out, once a step for all layers, which keys each token sees: groups of rows, tiles of prefill chunks."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from actors.decisions.model.spec import MaskSpec
from actors.tensors.attention.layer import (
    CachedRows,
    DecodeGroup,
    Indices,
    LogitsRows,
    PrefillTile,
    StepAttention,
    Visibility,
)
from actors.tensors.backends.cpu.kernels import DTYPE_TAGS
from actors.tensors.backends.cuda.attention import first_keys
from actors.tensors.backends.cuda.transfer import to_device

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


def positions_of(chunks: list[Chunk]) -> Indices:
    """The position of every token of a step."""
    counts = np.array([chunk.num_tokens for chunk in chunks])
    first_places = np.cumsum(counts) - counts
    return np.repeat(np.array([chunk.start for chunk in chunks]) - first_places, counts) + np.arange(counts.sum())


@dataclass(frozen=True)
class _Tokens:
    """A step's tokens: the block tables, which of them each token's is, and its position."""

    tables: Indices
    places_T: Indices
    positions_T: Indices

    def cached(self, rows: slice, which: "slice | Indices", mask_spec: MaskSpec) -> CachedRows:
        """Some of them, as rows."""
        positions = self.positions_T[which]
        first = first_keys(mask_spec, torch.from_numpy(positions)).numpy()
        return CachedRows(rows, self.tables, self.places_T[which], positions, first)


class VisibilityMaker:
    """Knows the mask_specs of a rank's attentions, and makes masks in the dtype of its queries."""

    def __init__(
        self,
        block_size: int,
        mask_specs: frozenset[MaskSpec],
        dtype: torch.dtype,
        device: torch.device,
        longest_as_rows: int = 0,
    ) -> None:
        """Chunks that end by position `longest_as_rows` are attended token by token, where a kernel reads blocks."""
        self.block_size = block_size
        self.mask_specs = mask_specs
        self.dtype = dtype
        self.device = device
        self.reads_blocks = device.type == "cpu" and dtype in DTYPE_TAGS  # no row is padded, and none needs a mask
        self.longest_as_rows = longest_as_rows if self.reads_blocks else 0

    def of_step(self, chunks: list[Chunk], tables: torch.Tensor, asked: list[int] | None = None) -> StepAttention:
        """Chunks in token order, those of one token first; `tables` int64 [rows, blocks], on the host.

        `asked`: the tokens whose logits are asked for; None: all.
        """
        positions_T, counts = positions_of(chunks), [chunk.num_tokens for chunk in chunks]
        places_T = np.repeat([chunk.table for chunk in chunks], counts)
        tokens = _Tokens(tables.numpy(), places_T, positions_T)
        blocks_T = tokens.tables[places_T, positions_T // self.block_size]
        slots_T = blocks_T * self.block_size + positions_T % self.block_size
        return StepAttention(
            slots_T=to_device(torch.from_numpy(slots_T), self.device),
            by_mask={mask_spec: self._visibility(chunks, tables, tokens, mask_spec) for mask_spec in self.mask_specs},
            asked=None if asked is None else self._asked(tokens, asked),
        )

    def _asked(self, tokens: "_Tokens", asked: list[int]) -> LogitsRows | None:
        if not self.longest_as_rows or len(asked) >= len(tokens.places_T):
            return None
        rows_Q, rows = np.array(asked, np.int64), slice(0, len(asked))
        by_mask = {mask_spec: tokens.cached(rows, rows_Q, mask_spec) for mask_spec in self.mask_specs}
        return LogitsRows(torch.from_numpy(rows_Q), by_mask)

    def _visibility(
        self, chunks: list[Chunk], tables: torch.Tensor, tokens: "_Tokens", mask_spec: MaskSpec
    ) -> Visibility:
        groups: list[DecodeGroup | CachedRows] = []
        tiles: list[PrefillTile] = []
        for are_rows, neighbours in itertools.groupby(chunks, self._are_rows):
            run = list(neighbours)
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
        return Visibility(tuple(groups), tuple(tiles))

    def _are_rows(self, chunk: Chunk) -> bool:
        return chunk.num_tokens == 1 or chunk.end <= self.longest_as_rows

    def _grouped(self, rows: list[Chunk], tables: torch.Tensor, mask_spec: MaskSpec) -> list[DecodeGroup]:
        return [self._group(rows[first:end], tables, mask_spec) for first, end in self._similar(rows, mask_spec)]

    def _similar(self, rows: list[Chunk], mask_spec: MaskSpec) -> list[tuple[int, int]]:
        """Cut rows into runs: within one, tables are at most twice as long as the shortest, and not too many keys."""
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
        first_keys_B1 = torch.tensor([[mask_spec.first_key(row.start)] for row in rows])
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
            tables_BN=to_device(tables_BN, self.device),
            mask_B11K=self._mask(visible_BK)[:, None, None, :],
        )

    def _tile(self, chunk: Chunk, tables: torch.Tensor, first: int, end: int, mask_spec: MaskSpec) -> PrefillTile:
        first_key = mask_spec.first_key(first)
        mask = None
        if first_key < first or mask_spec.first_key(end - 1) > first:
            first_keys_T1 = torch.tensor([[mask_spec.first_key(query)] for query in range(first, end)])
            keys_K = torch.arange(first_key, end)
            mask = self._mask((keys_K <= torch.arange(first, end)[:, None]) & (keys_K >= first_keys_T1))
        row = chunk.row + first - chunk.start
        slots_K = to_device(self._slots(tables, chunk, first_key, end), self.device)
        return PrefillTile(slice(row, row + end - first), slots_K, mask)

    def _slots(self, tables: torch.Tensor, chunk: Chunk, first: int, end: int) -> torch.Tensor:
        """Where the cache holds positions [first, end) of a sequence."""
        positions = torch.arange(first, end)
        return tables[chunk.table, positions // self.block_size] * self.block_size + positions % self.block_size

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Additive: 0 where visible, else -inf; made on the device from one byte an element."""
        on_device = to_device(visible, self.device)
        mask = torch.zeros(on_device.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~on_device, float("-inf"))
