"""The linear methods of the CPU backend: weights packed by oneDNN, or panel-packed for our own product."""

from collections.abc import Sequence

import torch
from torch import nn

from actors.tensors.backends.cpu import gemm
from actors.tensors.model.parallel_layers import ParallelLinear


class OneDnnPackedLinear:
    """A weight that oneDNN has packed once, in the order in which its product reads it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._num_outputs, self._num_inputs = weight.shape
        self._ones = weight.new_ones(1, self._num_inputs)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())  # noqa: SLF001 - it has no public name

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out]."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self._num_outputs)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x.contiguous(), self._packed, bias, "none", [], ""
        )
        return product

    def is_finite(self) -> bool:
        """Whether every weight is finite; by the sum of each row, in which NaN and infinity stay."""
        return bool(self.multiply(self._ones, None).isfinite().all())


class PanelPackedLinear:
    """A panel-packed weight, for CPUs on which gemm's product is the fastest."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._packed = gemm.pack(weight.detach())
        self._no_bias = weight.new_zeros(self.num_outputs)

    def addresses(self, bias: torch.Tensor | None = None) -> tuple[int, int]:
        """The addresses of the panels and of the bias [out] (or zeros), for `gemm.PackedWeight`."""
        return self._packed.data_ptr(), (self._no_bias if bias is None else bias).data_ptr()

    def weight(self) -> torch.Tensor:
        """The weight [out, in], unpacked."""
        return gemm.unpack(self._packed, self.num_outputs)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out]."""
        return gemm.multiply(x.contiguous(), self._packed, self._no_bias if bias is None else bias)

    def is_finite(self) -> bool:
        """Whether every weight is finite."""
        return bool(self._packed.sum(dtype=torch.float32).isfinite())


def linear_method(weights: Sequence[torch.Tensor]) -> OneDnnPackedLinear | PanelPackedLinear | None:
    """The fastest method for weights [out, in] that get the same input; None: torch's own product by each weight."""
    if weights[0].dtype not in (torch.float32, torch.bfloat16):
        return None
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    if gemm.why_not(weight) is None:
        return PanelPackedLinear(weight)
    return OneDnnPackedLinear(weight) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


def why_no_panels(layer: nn.Module) -> str | None:
    """Why a layer's weight is not panel-packed; None: it is."""
    assert isinstance(layer, ParallelLinear)
    method = getattr(layer.method, "merged", layer).method
    if isinstance(method, PanelPackedLinear):
        return None
    if layer.weight.numel():
        return "its weight stays as it is: other modules read it too, or there is no product of ours for its dtype"
    return gemm.why_not(layer.weight.new_empty(0, layer.in_features)) or "its outputs are no multiple of 16"
