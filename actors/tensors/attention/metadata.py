"""The attention metadata of one step: its tokens, the keys that each of them sees, and where the cache holds them.

T tokens of the step · Q logits rows · B rows, a token each · S sequences, O = S + 1 offsets · K keys · H KV heads ·
D dimension of a key or a value · N blocks, of a table or of the cache · b tokens of a block.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from actors.decisions.model.spec import AttentionSpec, MaskSpec

Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


@dataclass(frozen=True)
class Chunk:
    """One sequence's tokens in a step."""

    table: int  # its row of the block tables
    row: int  # index of its first token in the step
    start: int  # position of its first token
    num_tokens: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.num_tokens


class StepLayout(NamedTuple):
    """The tokens of a step, on the host."""

    chunks: list[Chunk]  # in token order, those of one token first
    tables: torch.Tensor  # int64 [rows, blocks]: the block tables; entries behind a sequence's last block mean nothing
    logits_rows: list[int] | None = None  # indices of the tokens whose logits are needed; None: all


class LayerCache(NamedTuple):
    """One attention's part of the KV cache."""

    spec: AttentionSpec
    keys_NbHD: torch.Tensor  # [blocks, block size, KV heads, dimension of a key]
    values_NbHD: torch.Tensor  # the same with the dimension of a value


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one token each, of similar length, whose keys are gathered through their block tables."""

    rows: slice  # of the step's tokens
    tables_BN: torch.Tensor  # int64; padded with a block of the same sequence
    mask_B11K: torch.Tensor  # additive, 0 or -inf, K = N × block size


@dataclass(frozen=True)
class PrefillTile:
    """Neighboring tokens of one sequence, and the keys that any of them sees."""

    rows: slice  # of the step's tokens
    slots_K: torch.Tensor  # int64
    mask_TK: torch.Tensor | None  # additive; None: causal over the tile's own keys


@dataclass(frozen=True)
class CachedRows:
    """Rows of one token each, of any length, whose keys a kernel reads straight from the cache."""

    rows: slice  # of the step's tokens, or of its logits rows
    tables: Indices  # [sequences, blocks]
    table_of_B: Indices  # the table of each row's sequence
    positions_B: Indices  # of the last key that each row sees: its own
    first_keys_B: Indices  # position of the first key that it sees


@dataclass(frozen=True)
class VisibleKeys:
    """The keys that each token sees, in all attentions of one MaskSpec."""

    groups: tuple[DecodeGroup | CachedRows, ...]
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True)
class LogitsRows:
    """The tokens whose logits are needed: the last layer computes queries and MLP for no others."""

    rows_Q: torch.Tensor  # int64, indices of tokens
    by_mask: dict[MaskSpec, CachedRows]


@dataclass(frozen=True)
class PagedRows:
    """The block tables of a step's sequences, for kernels that read them; a sequence's tokens are consecutive.

    The host's numbers are upper bounds, from which shapes follow. What is computed follows from the tensors, so that a
    CUDA graph can hold it.
    """

    tables_SN: torch.Tensor  # int32; entries behind a sequence's length are not read
    lengths_S: torch.Tensor  # int32: keys of each sequence, those of this step included
    first_tokens_O: torch.Tensor  # int32: index of each sequence's first token in the step, and T
    max_tokens: int  # of the step
    max_single: int  # sequences with one token in this step
    max_queries: int  # tokens of one sequence in this step
    max_keys: int  # of one sequence

    @classmethod
    def decode(cls, tables_BN: torch.Tensor, lengths_B: torch.Tensor, block_size: int) -> "PagedRows":
        """Rows of one token each; all bounds come from the tensors' shapes."""
        num_rows, num_blocks = tables_BN.shape
        first_tokens_O = torch.arange(num_rows + 1, dtype=torch.int32, device=tables_BN.device)
        return cls(tables_BN, lengths_B, first_tokens_O, num_rows, num_rows, 1, num_blocks * block_size)


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know about one step. A backend fills in what its kernels read."""

    slots_T: torch.Tensor  # int64: the slot of each token's key and value, block × block size + offset
    by_mask: dict[MaskSpec, VisibleKeys]
    logits_rows: LogitsRows | None = None  # None: all tokens, or the backend does not use it
    paged: PagedRows | None = None  # for kernels that read block tables


def positions_of(chunks: list[Chunk]) -> Indices:
    """The position of every token of a step [T]."""
    counts = np.array([chunk.num_tokens for chunk in chunks], np.int64)
    first_rows = np.cumsum(counts) - counts
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    return np.repeat(starts - first_rows, counts) + np.arange(counts.sum())
