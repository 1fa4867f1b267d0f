"""How a linear layer multiplies: by its weight as it is, or as oneDNN reads it, or in panels of our own."""

from typing import Protocol

import torch
from torch import nn

from actors.tensors.backends.cpu import gemm as panels


class LinearMethod(Protocol):
    """How a linear layer multiplies: it reads the tensors that the layer owns, in whatever form it keeps them."""

    def prepare(self, layer: nn.Module) -> None:
        """Called once, when the layer's tensors hold their values: pack or convert them."""

    def multiply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out], plus the bias [out] if one is given. The result is the caller's to write to."""

    def is_finite(self, layer: nn.Module) -> bool:
        """Whether what it keeps beside the layer's own tensors is numbers."""


class DenseLinear:
    """One weight [out, in], as it is in the checkpoint."""

    def prepare(self, layer: nn.Module) -> None:
        """Nothing to pack."""

    def multiply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out]."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return nn.functional.linear(x, weight, bias)

    def is_finite(self, layer: nn.Module) -> bool:
        """It keeps nothing."""
        return True


class OneDnnPackedLinear:
    """On CPU: the weight in the order in which oneDNN reads it, once and for all; the original is let go."""

    def prepare(self, layer: nn.Module) -> None:
        """Pack, and leave a weight of no elements: its dtype and device may still be asked."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        self._num_outputs, self._num_inputs = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())  # noqa: SLF001 - it has no public name
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def weight(self) -> torch.Tensor:
        """[out, in], as it was."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def multiply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out]."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self._num_outputs)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x.contiguous(), self._packed, bias, "none", [], ""
        )
        return product

    def is_finite(self, layer: nn.Module) -> bool:
        """The sum of each row shows it: what is no number does not go away by adding."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        ones = weight.new_ones(1, self._num_inputs)
        return bool(self.multiply(layer, ones, None).isfinite().all())


class PanelPackedLinear:
    """On CPUs whose dot product of bfloat16 is fastest so: the weight in panels; the original is let go."""

    def prepare(self, layer: nn.Module) -> None:
        """Pack, and leave a weight of no elements: its dtype and device may still be asked."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        self.num_outputs, self.num_inputs = weight.shape
        self._packed = panels.pack(weight.detach())
        self._no_bias = weight.new_zeros(self.num_outputs)
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def addresses(self, bias: torch.Tensor | None = None) -> tuple[int, int]:
        """Of the panels, and of the bias [out] or zeros, for `panels.multiply_rows`."""
        return self._packed.data_ptr(), (self._no_bias if bias is None else bias).data_ptr()

    def weight(self) -> torch.Tensor:
        """[out, in], as it was."""
        return panels.unpack(self._packed, self.num_outputs)

    def multiply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out]."""
        return panels.multiply(x.contiguous(), self._packed, self._no_bias if bias is None else bias)

    def is_finite(self, layer: nn.Module) -> bool:
        """Whether all of the weight is numbers."""
        return bool(self._packed.sum(dtype=torch.float32).isfinite())


def packing_of(weight: torch.Tensor) -> type[OneDnnPackedLinear] | type[PanelPackedLinear] | None:
    """How this machine multiplies fastest by a weight [out, in] that may be kept in another order; None: as it is."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if panels.is_available() and panels.suits(weight):
        return PanelPackedLinear
    return OneDnnPackedLinear if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


def pack(layer: nn.Linear) -> OneDnnPackedLinear | PanelPackedLinear:
    """Take over the weight of a layer that may be packed."""
    packing = packing_of(layer.weight)
    assert packing is not None, "may_be_packed was asked before"
    method = packing()
    method.prepare(layer)
    return method
