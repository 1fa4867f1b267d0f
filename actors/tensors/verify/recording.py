"""What a rank records: rows of its modules' inputs and outputs, by sequence and position, on the host."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

Side = Literal["in", "out", "partial"]


class Tap(NamedTuple):
    """A place in the model, by the name that the module has in the unsharded model too."""

    module: str
    side: Side  # partial: this shard's summand of an output that is summed over the shards
    leaf: int = 0  # which one of all that goes in or comes out
    call: int = 0  # of the module in one pass: some are called several times


LOGITS = Tap("", "out")  # of the rows that were sampled from


@dataclass(frozen=True)
class Rows:
    """The rows of one tap, a token each."""

    sequences: torch.Tensor  # int64 [n]
    positions: torch.Tensor  # int64 [n]
    values: torch.Tensor  # [n, *]

    def of(self, sequence: int) -> "Rows":
        """One sequence's rows by position; of rows that were computed again, the last."""
        indices = torch.nonzero(self.sequences == sequence).flatten()
        last = {int(position): int(index) for index, position in zip(indices, self.positions[indices], strict=True)}
        return self.take(torch.tensor([last[position] for position in sorted(last)], dtype=torch.int64))

    def take(self, rows: torch.Tensor) -> "Rows":
        """Some of the rows, by index or by a mask."""
        return Rows(self.sequences[rows], self.positions[rows], self.values[rows])

    def followed_by(self, other: "Rows") -> "Rows":
        """These rows, then those."""
        fields = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Rows(*map(torch.cat, fields))


@dataclass(frozen=True)
class Recording:
    """Everything that one rank recorded."""

    rank: int
    rows: dict[Tap, Rows]

    def packed(self) -> "PackedRecording":
        """The same as arrays, which Ray hands to another process without copying them."""
        return PackedRecording(self.rank, {tap: _pack(self.rows.pop(tap)) for tap in list(self.rows)})


class _Packed(NamedTuple):
    """Rows as arrays: the values as bytes, since numpy has no bfloat16."""

    sequences: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedRecording:
    """A Recording on its way between processes."""

    rank: int
    rows: dict[Tap, _Packed]

    def unpacked(self) -> Recording:
        """The Recording."""
        return Recording(self.rank, {tap: _unpack(packed) for tap, packed in self.rows.items()})


def _pack(rows: Rows) -> _Packed:
    values = rows.values.contiguous()
    numbers = values.flatten().view(torch.uint8).numpy()
    return _Packed(rows.sequences.numpy(), rows.positions.numpy(), numbers, values.dtype, tuple(values.shape))


def _unpack(packed: _Packed) -> Rows:
    # Arrays that Ray hands over must not be written to, which torch would only warn of
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        sequences, positions, values = map(torch.from_numpy, packed[:3])
    return Rows(sequences, positions, values.view(packed.dtype).view(packed.shape))


def by_token(tensor: torch.Tensor, batch: int, num_tokens: int) -> torch.Tensor | None:
    """A tensor as [batch, tokens, *], complex numbers as pairs; None where it does not hold something for each token.

    What is the same for the whole batch, such as angles by position, has 1 instead of the batch.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dim() >= 2 and tensor.shape[0] in (1, batch) and tensor.shape[1] == num_tokens:
        return tensor
    if tensor.dim() >= 2 and tensor.shape[0] == batch * num_tokens:
        return tensor.reshape(batch, num_tokens, *tensor.shape[1:])
    return None


def tensors_in(values: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensors among a module's arguments or results, with their number among all leaves."""
    for number, leaf in enumerate(tree_leaves(values)):
        if isinstance(leaf, torch.Tensor):
            yield number, leaf
