"""Lazy tensors: they record how a conversion makes them of stored tensors, so that a part is read from its sources.

Transformers' own conversions run on them: each stack, cat, split and transpose is recorded, and inverted for a read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.decisions.model.shard_plan import Interval
from actors.tensors.weights.safetensors_index import StoredTensor

Box = tuple[Interval, ...]  # a part of a tensor: one interval a dimension


@dataclass(frozen=True)
class Read:
    """A part of a stored tensor, and the view of the same shape that it is copied to."""

    stored: StoredTensor
    box: Box
    target: torch.Tensor


class NotLazyError(Exception):
    """A conversion used an operation that cannot be inverted."""


class Lazy(ABC):
    """A tensor without data, which knows the sources of each of its parts."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def reads(self, box: Box, target: torch.Tensor) -> Iterator[Read]:
        """The reads that fill `target` [shape of the box] with a part of this tensor."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def contiguous(self) -> "Lazy":
        """The same tensor: it has no memory layout."""
        return self

    def transpose(self, dim0: int, dim1: int) -> "Lazy":
        """As torch.Tensor.transpose."""
        return Transposed(self, dim0, dim1)

    def __getattr__(self, name: str) -> Any:
        """Raises NotLazyError for any other attribute of tensors."""
        raise NotLazyError(name)

    def __getitem__(self, index: Any) -> Any:
        """Raises NotLazyError: indexing can do too many things to be followed backwards."""
        raise NotLazyError(f"[{index}]")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for torch.stack and other functions on lazy tensors."""
        if func not in _FUNCTIONS:
            raise NotLazyError(str(func))
        return _FUNCTIONS[func](*args, **(kwargs or {}))


class Leaf(Lazy):
    """A stored tensor."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self.shape = torch.Size(stored.shape)
        self.dtype = stored.dtype

    def reads(self, box: Box, target: torch.Tensor) -> Iterator[Read]:
        """One read, of the stored tensor itself."""
        yield Read(self.stored, box, target)


class Joined(Lazy):
    """Tensors concatenated along a dimension."""

    def __init__(self, parts: Sequence[Lazy], dim: int) -> None:
        self.parts = parts
        self.dim = dim % parts[0].ndim
        sizes = list(parts[0].shape)
        sizes[self.dim] = sum(part.shape[self.dim] for part in parts)
        if any(_without(part.shape, self.dim) != _without(sizes, self.dim) for part in parts):
            raise ValueError(f"tensors of shapes {[list(part.shape) for part in parts]} cannot be joined")
        self.shape = torch.Size(sizes)
        self.dtype = parts[0].dtype

    def reads(self, box: Box, target: torch.Tensor) -> Iterator[Read]:
        """The reads of the parts that overlap the box."""
        (first, end), start, filled = box[self.dim], 0, 0
        for part in self.parts:
            size = part.shape[self.dim]
            inside = max(first - start, 0), min(end - start, size)
            length = inside[1] - inside[0]
            if length > 0:
                part_box = (*box[: self.dim], inside, *box[self.dim + 1 :])
                yield from part.reads(part_box, target.narrow(self.dim, filled, length))
                filled += length
            start += size


class Stacked(Lazy):
    """Tensors of one shape, stacked along a new dimension."""

    def __init__(self, parts: Sequence[Lazy], dim: int) -> None:
        self.parts = parts
        self.dim = dim % (parts[0].ndim + 1)
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"tensors of shapes {[list(part.shape) for part in parts]} cannot be stacked")
        self.shape = torch.Size((*parts[0].shape[: self.dim], len(parts), *parts[0].shape[self.dim :]))
        self.dtype = parts[0].dtype

    def reads(self, box: Box, target: torch.Tensor) -> Iterator[Read]:
        """The reads of the parts in the box."""
        first, end = box[self.dim]
        rest = (*box[: self.dim], *box[self.dim + 1 :])
        for index, part in enumerate(self.parts[first:end]):
            yield from part.reads(rest, target.select(self.dim, index))


class Narrowed(Lazy):
    """An interval of one dimension, as torch.narrow."""

    def __init__(self, whole: Lazy, dim: int, first: int, length: int) -> None:
        self.whole = whole
        self.dim = dim % whole.ndim
        self.first = first
        self.shape = torch.Size((*whole.shape[: self.dim], length, *whole.shape[self.dim + 1 :]))
        self.dtype = whole.dtype

    def reads(self, box: Box, target: torch.Tensor) -> Iterator[Read]:
        """The reads of the same box, offset in the whole tensor."""
        first, end = box[self.dim]
        interval = (first + self.first, end + self.first)
        yield from self.whole.reads((*box[: self.dim], interval, *box[self.dim + 1 :]), target)


class Transposed(Lazy):
    """A tensor with two dimensions exchanged."""

    def __init__(self, whole: Lazy, dim0: int, dim1: int) -> None:
        self.whole = whole
        self.dims = dim0 % whole.ndim, dim1 % whole.ndim
        self.shape = torch.Size(self._swapped(whole.shape))
        self.dtype = whole.dtype

    def reads(self, box: Box, target: torch.Tensor) -> Iterator[Read]:
        """The reads of the transposed box into the transposed target."""
        yield from self.whole.reads(self._swapped(box), target.transpose(*self.dims))

    def _swapped(self, items: Sequence[Any]) -> tuple[Any, ...]:
        swapped = list(items)
        dim0, dim1 = self.dims
        swapped[dim0], swapped[dim1] = swapped[dim1], swapped[dim0]
        return tuple(swapped)


def _cat(tensors: Sequence[Lazy], dim: int = 0) -> Lazy:
    return Joined(tensors, dim)


def _stack(tensors: Sequence[Lazy], dim: int = 0) -> Lazy:
    return Stacked(tensors, dim)


def _split(tensor: Lazy, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Lazy, ...]:
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        total = tensor.shape[dim]
        sizes = [min(sizes, total - first) for first in range(0, total, sizes)]
    if sum(sizes) != tensor.shape[dim]:
        raise ValueError(f"{tensor.shape[dim]} rows cannot be split into {list(sizes)}")
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    return tuple(Narrowed(tensor, dim, first, size) for first, size in zip(firsts, sizes, strict=True))


def _chunk(input: Lazy, chunks: int, dim: int = 0) -> tuple[Lazy, ...]:  # noqa: A002 - torch's name
    return _split(input, -(-input.shape[dim] // chunks), dim)


def _transpose(input: Lazy, dim0: int, dim1: int) -> Lazy:  # noqa: A002 - torch's name
    return Transposed(input, dim0, dim1)


def _without(items: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*items[:dim], *items[dim + 1 :])


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.transpose: _transpose,
}
