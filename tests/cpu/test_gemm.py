"""Products with panel-packed weights against torch's own, on CPUs that have the instruction."""

import math

import pytest
import torch
from torch import nn

from actors.tensors.backends.cpu import gemm
from actors.tensors.backends.cpu.linear import PanelPackedLinear, linear_method
from actors.tensors.model.parallel_layers import ColwiseLinear, owns_weight, rebase
from cluster.collectives.interface import LoneShard

needs_instruction = pytest.mark.skipif(
    gemm.why_not(torch.empty(32, 2, dtype=torch.bfloat16)) is not None,
    reason="this CPU has no AVX-512 dot product of bfloat16, or has AMX, which is faster",
)
SHAPES = [(16, 2), (32, 8), (48, 34), (112, 1026), (96, 4096)]  # outputs, inputs


def weight_of(num_outputs: int, num_inputs: int) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(num_inputs)).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_brings_the_weight_back(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    packed = gemm.pack(weight)
    assert packed.numel() == weight.numel()
    assert torch.equal(gemm.unpack(packed, shape[0]), weight)


@needs_instruction
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [0, 1, 11, 12, 13, 30, 401])
def test_a_product_is_torchs_and_no_row_depends_on_the_others(shape: tuple[int, int], num_rows: int) -> None:
    weight = weight_of(*shape)
    packed, bias = gemm.pack(weight), weight_of(shape[0], 1)[:, 0]
    x = torch.randn(num_rows, shape[1]).bfloat16()
    out = gemm.multiply(x, packed, bias)
    expected = x.double() @ weight.double().T + bias.double()
    sums_of_sizes = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    error = (out.double() - expected).abs()
    assert bool((error <= 2**-8 * expected.abs() + 1e-5 * sums_of_sizes).all())  # rounded once
    alone = [gemm.multiply(row.unsqueeze(0), packed, bias) for row in x]
    assert torch.equal(out, torch.cat([out[:0], *alone]))


@needs_instruction
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay(value: float) -> None:
    linear = rebase(nn.Linear(8, 32, bias=False, dtype=torch.bfloat16), ColwiseLinear).set_group(LoneShard())
    linear.requires_grad_(False)
    x = torch.ones(3, 8).bfloat16()
    assert owns_weight(linear)
    method = linear_method([linear.weight])
    assert isinstance(method, PanelPackedLinear)
    linear.hand_over(method)
    assert not owns_weight(linear)
    assert method.is_finite()
    x[1, 5] = value
    assert linear(x).isfinite().all(dim=1).tolist() == [True, False, True]
    weight = method.weight()
    weight[17, 3] = value
    assert not PanelPackedLinear(weight).is_finite()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((15, 8), torch.bfloat16), ((32, 7), torch.bfloat16), ((32, 8), torch.float32)]
)
def test_other_weights_are_not_panel_packed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert gemm.why_not(torch.zeros(shape, dtype=dtype)) is not None
