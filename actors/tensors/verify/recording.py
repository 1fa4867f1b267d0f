"""What a rank records: rows of its modules' inputs and outputs, by sequence and position, on the host."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
