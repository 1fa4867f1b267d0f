"""Linear layers with the same input, multiplied as one product."""

from collections.abc import Sequence

import torch
from torch import nn

from actors.tensors.backend import LinearMethod


class MergedColwise:
    """Linear layers of one module that get the same input: their weights are multiplied as one.

    That they do is known from the probe. A layer that asks with another input still gets its right part, but the whole
    product is computed anew for it.
    """

    def __init__(self, method: LinearMethod, sizes: Sequence[int], biases: Sequence[torch.Tensor | None]) -> None:
        """`method` holds the weights of all layers, `sizes` are their numbers of outputs; all have a bias, or none."""
        self.method = method
        self.sizes = list(sizes)
        self.bias = torch.cat([bias for bias in biases if bias is not None]) if biases[0] is not None else None
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}  # that no layer has taken yet, by the layer's index

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[*, in] → [*, outputs of all layers, one after the other]."""
        return self.method.multiply(x, self.bias)

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """[*, in] → [*, outputs of one layer]: whoever asks first computes for all."""
        if self._input is not x or index not in self._parts:
            self._input, self._parts = x, dict(enumerate(torch.split(self.product(x), self.sizes, dim=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return part


class MergedPart:
    """One layer's part of a MergedColwise, as its LinearMethod."""

    def __init__(self, merged: MergedColwise, index: int) -> None:
        self.merged = merged
        self.index = index

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out of this layer], its bias included."""
        return self.merged.part(self.index, x)

    def is_finite(self) -> bool:
        """The first layer answers for all."""
        return self.index > 0 or self.merged.method.is_finite()


def merged_of(layers: Sequence[nn.Module]) -> MergedColwise | None:
    """The product of exactly these layers, in this order; None where they are not merged so."""
    methods = [getattr(layer, "method", None) for layer in layers]
    if not all(isinstance(method, MergedPart) for method in methods):
        return None
    merged = {id(method.merged): method.merged for method in methods if isinstance(method, MergedPart)}
    indices = [method.index for method in methods if isinstance(method, MergedPart)]
    (first, *others) = merged.values()
    return None if others or indices != list(range(len(first.sizes))) else first
