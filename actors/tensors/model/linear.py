"""Merges linear layers that get the same input into one column-parallel product."""

from collections.abc import Sequence

import torch
from torch import nn

from actors.tensors.backend import LinearMethod


class MergedColwise:
    """The merged column-parallel product of linear layers of one module that get the same input.

    The probe has seen that they do. A layer that is called with another input still gets its right part, but the whole
    product is computed again for it.
    """

    def __init__(self, method: LinearMethod, sizes: Sequence[int], biases: Sequence[torch.Tensor | None]) -> None:
        """`method` holds the weights of all layers, `sizes` are their numbers of outputs; all have a bias, or none."""
        self.method = method
        self.sizes = list(sizes)
        self.bias = torch.cat([bias for bias in biases if bias is not None]) if biases[0] is not None else None
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}  # by the layer's index; each is taken once

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[*, in] → [*, outputs of all layers, one after the other]."""
        return self.method.multiply(x, self.bias)

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """[*, in] → [*, outputs of one layer]: the first call with an input computes the product for all layers."""
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
        """Whether all merged weights are finite; checked for the first layer only."""
        return self.index > 0 or self.merged.method.is_finite()


def merged_of(layers: Sequence[nn.Module]) -> MergedColwise | None:
    """The merged product of exactly these layers in this order; None if they are not merged so."""
    methods = [getattr(layer, "method", None) for layer in layers]
    if not all(isinstance(method, MergedPart) for method in methods):
        return None
    merged = {id(method.merged): method.merged for method in methods if isinstance(method, MergedPart)}
    indices = [method.index for method in methods if isinstance(method, MergedPart)]
    (first, *others) = merged.values()
    return None if others or indices != list(range(len(first.sizes))) else first
