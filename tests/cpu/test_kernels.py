"""The CPU kernels against what they stand for, written out in torch."""

import math

import pytest
import torch
from transformers.models.llama import modeling_llama as known

from actors.tensors.backends.cpu import kernels

TYPES = [torch.float32, torch.bfloat16]
ULPS = {torch.float32: 4e-6, torch.bfloat16: 1e-2}


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=ULPS[out.dtype], atol=ULPS[out.dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_norm_is_llamas_also_over_strided_rows(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    norm = known.LlamaRMSNorm(size, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 2 * size).to(dtype)[:, :size]
    out = torch.empty(5, size, dtype=dtype)
    args = (
        x.data_ptr(),
        norm.weight.data_ptr(),
        out.data_ptr(),
        5,
        size,
        x.stride(0),
        size,
        1e-5,
        kernels.DTYPE_TAGS[dtype],
    )
    kernels.rms_norm(*args)
    close(out, norm(x).detach())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_gate_is_silu_times_up(dtype: torch.dtype) -> None:
    edges = torch.tensor([-1e4, -90.0, -1e-3, 0.0, 1e-3, 90.0, 1e4])
    both = torch.cat([torch.randn(3, 7) * 5, torch.randn(3, 7)], dim=1).to(dtype)
    both[1, :7] = edges
    out = torch.empty(3, 7, dtype=dtype)
    gate, up = both[:, :7], both[:, 7:]
    kernels.silu_mul(gate.data_ptr(), up.data_ptr(), out.data_ptr(), 3, 7, 14, 14, kernels.DTYPE_TAGS[dtype])
    close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_is_llamas_in_any_layout_of_its_input(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3 * 8 + 5).to(dtype)[:, : 3 * 8].view(6, 3, 8)  # tokens, heads, dimension; rows further apart
    angles = torch.rand(1, 6, 8) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = torch.empty(6, 3, 8, dtype=dtype)
    args = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), 6, 3, 8, (x.stride(0), x.stride(1))
    kernels.rotate(*args, kernels.DTYPE_TAGS[dtype])
    heads = x.transpose(0, 1).unsqueeze(0)
    close(out, known.apply_rotary_pos_emb(heads, heads, cos, sin)[0][0].transpose(0, 1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fault_in_the_numbers_is_not_hidden(dtype: torch.dtype, value: float) -> None:
    dtype_tag = kernels.DTYPE_TAGS[dtype]
    x, weight, out = torch.ones(1, 8, dtype=dtype), torch.ones(8, dtype=dtype), torch.zeros(1, 8, dtype=dtype)
    x[0, 3] = value
    kernels.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), 1, 8, 8, 8, 1e-5, dtype_tag)
    assert out.isnan().any()
    kernels.silu_mul(x.data_ptr(), x.data_ptr(), out.data_ptr(), 1, 8, 8, 8, dtype_tag)
    assert not out.isfinite().all()
    keys, values = torch.ones(2, 1, 4, 1, 8, dtype=dtype)  # one block of four tokens
    keys[0, 2, 0, 3] = value
    number, no_sinks = torch.tensor([0]).numpy(), torch.zeros(0).numpy()
    tables, position = torch.tensor([[0]]).numpy(), torch.tensor([3]).numpy()
    query = torch.ones(1, 1, 8, dtype=dtype)
    pointers = query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr()
    rows, sizes = (tables, number, position, number), (1, 1, 8, 8, 4, query.element_size())
    kernels.attend_decode(pointers, rows, no_sinks, sizes, (8, 8), 1.0, 0.0, dtype_tag)
    assert out.isnan().all()
    keys[0, 2, 0, 3] = 1
    kernels.attend_decode(pointers, rows, no_sinks, sizes, (8, 8), 1.0, 0.0, dtype_tag)
    close(out, torch.ones(1, 8, dtype=dtype))


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    x = torch.randn(1, 4096)
    x[0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, math.inf, -0.0])  # ties go to the even one
    to_float32, one = x.to(torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    out = torch.empty_like(to_float32)
    scale = float(torch.rsqrt(to_float32.float()[0, 4:].pow(2).mean() + 1e-5))
    row = to_float32[:, 4:].contiguous()
    kernels.rms_norm(
        row.data_ptr(), one.data_ptr(), out.data_ptr(), 1, 4092, 4092, 4092, 1e-5, kernels.DTYPE_TAGS[row.dtype]
    )
    expected = (row.float() * scale).to(torch.bfloat16)
    assert (out[0, :4092] != expected[0]).float().mean() < 0.01  # the scale itself is summed in another order
