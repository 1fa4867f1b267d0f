"""Decode attention by whole vectors against the kernel that reads one key after the other."""

import math

import numpy as np
import pytest
import torch

from actors.tensors.backends.cpu import kernels
from actors.tensors.backends.cpu import paged_attention_avx512 as dot_attention
from actors.tensors.backends.cpu.avx512 import has_dot_product

DTYPE_TAGS = kernels.DTYPE_TAGS[torch.bfloat16]
needs_instruction = pytest.mark.skipif(not has_dot_product(), reason="this CPU has no AVX-512 dot product of bfloat16")


class Case:
    """Rows of several lengths, whose blocks lie anywhere in a cache; what no row sees is no number."""

    def __init__(self, heads: tuple[int, int], dims: tuple[int, int], block_size: int) -> None:
        (num_heads, num_kv_heads), (key_dim, value_dim) = heads, dims
        generator = torch.Generator().manual_seed(key_dim + num_heads)
        self.positions, self.first_keys = np.array([0, 16, 99, 130]), np.array([0, 3, 32, 95])
        num_rows, longest = len(self.positions), -(-131 // block_size)
        num_blocks = num_rows * longest
        self.keys = torch.full((num_blocks, block_size, num_kv_heads, key_dim), math.nan)
        self.values = torch.full((num_blocks, block_size, num_kv_heads, value_dim), math.nan)
        self.tables = torch.randperm(num_blocks, generator=generator).view(num_rows, longest).numpy()
        for row in range(num_rows):
            for position in range(self.first_keys[row], self.positions[row] + 1):
                place = self.tables[row, position // block_size], position % block_size
                self.keys[place] = torch.randn(num_kv_heads, key_dim, generator=generator)
                self.values[place] = torch.randn(num_kv_heads, value_dim, generator=generator)
        self.keys, self.values = self.keys.bfloat16(), self.values.bfloat16()
        self.query = torch.randn(num_rows, num_heads + 1, key_dim, generator=generator).bfloat16()[:, 1:]
        self.sizes = num_heads, num_kv_heads, key_dim, value_dim, block_size, 2

    def run(self, attend: object, sinks: torch.Tensor, softcap: float) -> torch.Tensor:
        out = torch.empty(len(self.positions), self.sizes[0], self.sizes[3], dtype=torch.bfloat16)
        addresses = self.query.data_ptr(), self.keys.data_ptr(), self.values.data_ptr(), out.data_ptr()
        places, strides = np.arange(len(self.positions)), (self.query.stride(0), self.query.stride(1))
        rows = self.tables, places, self.positions, self.first_keys
        attend(addresses, rows, sinks.numpy(), self.sizes, strides, self.sizes[2] ** -0.5, softcap, DTYPE_TAGS)
        return out


@needs_instruction
@pytest.mark.parametrize("heads", [(8, 4), (4, 4), (3, 1), (4, 1)])
@pytest.mark.parametrize(("dims", "block_size"), [((64, 64), 16), ((32, 128), 48), ((128, 64), 32)])
@pytest.mark.parametrize(("has_sinks", "softcap"), [(False, 0.0), (True, 0.0), (False, 5.0)])
def test_rows_attend_to_what_they_see_and_nothing_else(
    heads: tuple[int, int], dims: tuple[int, int], block_size: int, has_sinks: bool, softcap: float
) -> None:
    case = Case(heads, dims, block_size)
    assert dot_attention.suits(torch.bfloat16, torch.device("cpu"), block_size, *dims)
    sinks = torch.randn(heads[0]) if has_sinks else torch.zeros(0)
    out = case.run(dot_attention.attend_decode, sinks, softcap)
    assert out.isfinite().all()
    torch.testing.assert_close(out, case.run(kernels.attend_decode, sinks, softcap), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("block_size", "key_dim", "value_dim", "dtype"),
    [
        (16, 48, 64, torch.bfloat16),
        (16, 64, 32, torch.bfloat16),
        (8, 64, 64, torch.bfloat16),
        (16, 64, 64, torch.float32),
    ],
)
def test_sizes_that_do_not_fill_vectors_are_left_to_the_other_kernel(
    block_size: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    assert not dot_attention.suits(dtype, torch.device("cpu"), block_size, key_dim, value_dim)
