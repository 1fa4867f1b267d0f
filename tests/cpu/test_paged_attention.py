"""Paged attention by AVX-512 vectors against the kernel that reads one key after the other."""

import math

import numpy as np
import pytest
import torch

from actors.decisions.model.spec import AttentionSpec
from actors.tensors.backends.cpu import kernels, paged_attention, paged_attention_avx512
from actors.tensors.backends.cpu.avx512 import has_dot_product
from actors.tensors.backends.cpu.kernels import HeadRows, KeysValues
from actors.tensors.backends.cpu.paged_attention import AttentionSizes, RowTables

needs_instruction = pytest.mark.skipif(not has_dot_product(), reason="this CPU has no AVX-512 dot product of bfloat16")


def spec_of(key_dim: int, value_dim: int) -> AttentionSpec:
    return AttentionSpec("", 4, 2, key_dim, value_dim)


class Case:
    """Rows of several lengths, whose blocks lie anywhere in a cache; keys and values that no row sees are NaN."""

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
                slot = self.tables[row, position // block_size], position % block_size
                self.keys[slot] = torch.randn(num_kv_heads, key_dim, generator=generator)
                self.values[slot] = torch.randn(num_kv_heads, value_dim, generator=generator)
        self.keys, self.values = self.keys.bfloat16(), self.values.bfloat16()
        self.query = torch.randn(num_rows, num_heads + 1, key_dim, generator=generator).bfloat16()[:, 1:]
        self.sizes = num_heads, num_kv_heads, key_dim, value_dim, block_size, 2

    def run(self, attend: object, sinks: torch.Tensor, softcap: float) -> torch.Tensor:
        out = torch.empty(len(self.positions), self.sizes[0], self.sizes[3], dtype=torch.bfloat16)
        query = HeadRows(self.query.data_ptr(), self.query.stride(0), self.query.stride(1))
        cache = KeysValues(self.keys.data_ptr(), self.values.data_ptr())
        rows = RowTables(self.tables, np.arange(len(self.positions)), self.positions, self.first_keys)
        sizes = AttentionSizes(*self.sizes, self.sizes[2] ** -0.5, softcap)
        attend(query, cache, out.data_ptr(), rows, sinks.numpy(), sizes, kernels.DTYPE_TAGS[torch.bfloat16])
        return out


@needs_instruction
@pytest.mark.parametrize("heads", [(8, 4), (4, 4), (3, 1), (4, 1)])
@pytest.mark.parametrize(("dims", "block_size"), [((64, 64), 16), ((32, 128), 48), ((128, 64), 32)])
@pytest.mark.parametrize(("has_sinks", "softcap"), [(False, 0.0), (True, 0.0), (False, 5.0)])
def test_rows_attend_to_what_they_see_and_nothing_else(
    heads: tuple[int, int], dims: tuple[int, int], block_size: int, has_sinks: bool, softcap: float
) -> None:
    case = Case(heads, dims, block_size)
    assert paged_attention_avx512.why_not(spec_of(*dims), torch.bfloat16, block_size) is None
    sinks = torch.randn(heads[0]) if has_sinks else torch.zeros(0)
    out = case.run(paged_attention_avx512.attend_rows, sinks, softcap)
    assert out.isfinite().all()
    torch.testing.assert_close(out, case.run(paged_attention.attend_rows, sinks, softcap), rtol=1e-2, atol=1e-2)


@needs_instruction
@pytest.mark.parametrize(
    ("block_size", "key_dim", "value_dim", "dtype", "reason"),
    [
        (16, 48, 64, torch.bfloat16, "heads of 48 and 64 numbers"),
        (16, 64, 32, torch.bfloat16, "heads of 64 and 32 numbers"),
        (8, 64, 64, torch.bfloat16, "cache.block_size 8"),
        (16, 64, 64, torch.float32, "not float32"),
    ],
)
def test_sizes_that_do_not_fill_vectors_are_left_to_the_other_kernel(
    block_size: int, key_dim: int, value_dim: int, dtype: torch.dtype, reason: str
) -> None:
    assert reason in str(paged_attention_avx512.why_not(spec_of(key_dim, value_dim), dtype, block_size))
