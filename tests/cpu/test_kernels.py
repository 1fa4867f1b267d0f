"""The small CPU kernels against the same computations in torch."""

import math

import pytest
import torch
from transformers.models.llama import modeling_llama as known

from actors.tensors.backends.cpu import kernels
from actors.tensors.backends.cpu.kernels import CosSin, HeadRows, KeysValues, Rows
from actors.tensors.backends.cpu.paged_attention import AttentionSizes, RowTables, attend_rows

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
    rows, target = Rows(x.data_ptr(), x.stride(0)), Rows(out.data_ptr(), size)
    kernels.rms_norm(rows, norm.weight.data_ptr(), target, 5, size, 1e-5, True, kernels.DTYPE_TAGS[dtype])
    close(out, norm(x).detach())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_gate_is_silu_times_up(dtype: torch.dtype) -> None:
    edges = torch.tensor([-1e4, -90.0, -1e-3, 0.0, 1e-3, 90.0, 1e4])
    both = torch.cat([torch.randn(3, 7) * 5, torch.randn(3, 7)], dim=1).to(dtype)
    both[1, :7] = edges
    out = torch.empty(3, 7, dtype=dtype)
    gate, up = both[:, :7], both[:, 7:]
    halves = Rows(gate.data_ptr(), 14), Rows(up.data_ptr(), 14)
    kernels.silu_mul(*halves, out.data_ptr(), 3, 7, kernels.DTYPE_TAGS[dtype])
    close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_is_llamas_in_any_layout_of_its_input(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3 * 8 + 5).to(dtype)[:, : 3 * 8].view(6, 3, 8)  # tokens, heads, dimension; rows further apart
    angles = torch.rand(1, 6, 8) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = torch.empty(6, 3, 8, dtype=dtype)
    source, turns = HeadRows(x.data_ptr(), x.stride(0), x.stride(1)), CosSin(cos.data_ptr(), sin.data_ptr())
    kernels.rotate(source, turns, out.data_ptr(), 6, 3, 8, kernels.DTYPE_TAGS[dtype])
    heads = x.transpose(0, 1).unsqueeze(0)
    close(out, known.apply_rotary_pos_emb(heads, heads, cos, sin)[0][0].transpose(0, 1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fault_in_the_numbers_is_not_hidden(dtype: torch.dtype, value: float) -> None:
    dtype_tag = kernels.DTYPE_TAGS[dtype]
    x, weight, out = torch.ones(1, 8, dtype=dtype), torch.ones(8, dtype=dtype), torch.zeros(1, 8, dtype=dtype)
    x[0, 3] = value
    row, target = Rows(x.data_ptr(), 8), Rows(out.data_ptr(), 8)
    kernels.rms_norm(row, weight.data_ptr(), target, 1, 8, 1e-5, True, dtype_tag)
    assert out.isnan().any()
    kernels.silu_mul(row, row, out.data_ptr(), 1, 8, dtype_tag)
    assert not out.isfinite().all()
    keys, values = torch.ones(2, 1, 4, 1, 8, dtype=dtype)  # one block of four tokens
    keys[0, 2, 0, 3] = value
    number, no_sinks = torch.tensor([0]).numpy(), torch.zeros(0).numpy()
    tables, position = torch.tensor([[0]]).numpy(), torch.tensor([3]).numpy()
    query = torch.ones(1, 1, 8, dtype=dtype)
    queries, cache = HeadRows(query.data_ptr(), 8, 8), KeysValues(keys.data_ptr(), values.data_ptr())
    rows = RowTables(tables, number, position, number)
    sizes = AttentionSizes(1, 1, 8, 8, 4, query.element_size(), 1.0, 0.0)
    attend_rows(queries, cache, out.data_ptr(), rows, no_sinks, sizes, dtype_tag)
    assert out.isnan().all()
    keys[0, 2, 0, 3] = 1
    attend_rows(queries, cache, out.data_ptr(), rows, no_sinks, sizes, dtype_tag)
    close(out, torch.ones(1, 8, dtype=dtype))


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    x = torch.randn(1, 4096)
    x[0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, math.inf, -0.0])  # ties go to the even one
    rounded, one = x.to(torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    out = torch.empty_like(rounded)
    scale = float(torch.rsqrt(rounded.float()[0, 4:].pow(2).mean() + 1e-5))
    row = rounded[:, 4:].contiguous()
    source, target = Rows(row.data_ptr(), 4092), Rows(out.data_ptr(), 4092)
    kernels.rms_norm(source, one.data_ptr(), target, 1, 4092, 1e-5, True, kernels.DTYPE_TAGS[row.dtype])
    expected = (row.float() * scale).to(torch.bfloat16)
    assert (out[0, :4092] != expected[0]).float().mean() < 0.01  # the scale itself is summed in another order
