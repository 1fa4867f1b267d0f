"""The records of attention in one step: who the tokens are, and which keys each of them sees.

T tokens of the step · Q of them whose logits are asked for · B rows, a token each · K keys · N blocks of a table.
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
    row: int  # of its first token among the step's
    start: int  # position of its first token
    num_tokens: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.num_tokens


class StepLayout(NamedTuple):
    """The tokens of a step, on the host."""

    chunks: list[Chunk]  # in token order, those of one token first
    tables: torch.Tensor  # int64 [rows, blocks]: the blocks of every sequence; behind its last one lies anything
    logits_rows: list[int] | None = None  # the tokens whose logits are asked for; None: all


class LayerCache(NamedTuple):
    """One attention's part of the KV cache."""

    spec: AttentionSpec
    keys_NbHD: torch.Tensor  # [blocks, block size, KV heads, dimension of a key]
    values_NbHD: torch.Tensor  # the same with the dimension of a value


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
class CachedRows:
    """Rows of one token each, of any length: a kernel reads their keys where they lie in the cache."""

    rows: slice  # of the step's tokens, or of those whose logits are asked for
    tables: Indices  # [sequences, blocks]
    table_of_B: Indices  # each row's sequence among the tables
    positions_B: Indices  # of the last key that it sees
    first_keys_B: Indices  # and of the first


@dataclass(frozen=True)
class VisibleKeys:
    """Which keys each token sees, for all attentions of one MaskSpec."""

    groups: tuple[DecodeGroup | CachedRows, ...]
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True)
class LogitsRows:
    """Those of a step's tokens whose logits are asked for: no others are needed behind the last layer's keys."""

    rows_Q: torch.Tensor  # int64, among the tokens
    by_mask: dict[MaskSpec, CachedRows]


@dataclass(frozen=True)
class PagedRows:
    """Where the keys of each sequence of a step lie; the tokens of one sequence stand together, in its order."""

    tables_SN: torch.Tensor  # int32; what lies behind a sequence's length is never seen, but must be a block
    lengths_S: torch.Tensor  # int32: keys of each sequence, those of this step included
    first_tokens_S1: torch.Tensor  # int32 [S + 1]: where each one's tokens begin in the step
    first_keys_S1: torch.Tensor  # int32 [S + 1]: the kernel asks for it, and reads it only without block tables
    max_queries: int  # tokens of one sequence in this step, at most
    max_keys: int

    @classmethod
    def decode(cls, tables_BN: torch.Tensor, lengths_B: torch.Tensor, block_size: int) -> "PagedRows":
        """Rows of one token each; every number that shapes a launch comes from the shapes of the tensors."""
        num_rows, num_blocks = tables_BN.shape
        rows = torch.arange(num_rows + 1, dtype=torch.int32, device=tables_BN.device)
        max_keys = num_blocks * block_size
        return cls(tables_BN, lengths_B, rows, rows * max_keys, 1, max_keys)


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention must know about one step. A backend fills in what its kernels read."""

    slots_T: torch.Tensor  # int64: where each token's key and value are written (block × block size + offset)
    by_mask: dict[MaskSpec, VisibleKeys]
    logits_rows: LogitsRows | None = None  # None: the logits of all tokens, or nobody reads it
    paged: PagedRows | None = None  # for kernels that read block tables themselves


def positions_of(chunks: list[Chunk]) -> Indices:
    """The position of every token of a step [T]."""
    counts = np.array([chunk.num_tokens for chunk in chunks])
    first_rows = np.cumsum(counts) - counts
    return np.repeat(np.array([chunk.start for chunk in chunks]) - first_rows, counts) + np.arange(counts.sum())
