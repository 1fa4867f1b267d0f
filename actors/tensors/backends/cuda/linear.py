"""Products on CUDA: layers that get the same input are one product of cuBLAS, whose weights lie one after the other."""

from collections.abc import Sequence

import torch

from actors.tensors.backend import LinearMethod


class ConcatenatedLinear:
    """See LinearMethod: the weights of several layers as one."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weight = torch.cat(list(weights))  # [outputs of all layers, in]

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, outputs of all layers]."""
        return torch.nn.functional.linear(x, self._weight, bias)

    def is_finite(self) -> bool:
        """Whether every number of the weights is finite."""
        return bool(self._weight.sum(dtype=torch.float32).isfinite())


def linear_method(weights: Sequence[torch.Tensor]) -> LinearMethod | None:
    """One product for several layers; a layer alone stays as it is."""
    return ConcatenatedLinear(weights) if len(weights) > 1 else None
