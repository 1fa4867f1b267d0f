"""Triton kernels of a decoder layer beside its products and attention, and the functions that launch them.

T tokens of the step · h query heads · H KV heads · D their dimension, half of which is HALF · N columns of a row.
They compute in float32, and round once, where the models' own code rounds after each operation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.tensors.attention.metadata import LayerCache

_ROWS = tl.constexpr(8)  # heads of a program
_COLUMNS = tl.constexpr(1024)  # of a program
ACTIVATIONS = ("silu", "gelu_tanh")


@triton.jit
def _add_rms_norm(
    x: tl.tensor, y: tl.tensor, weight: tl.tensor, total: tl.tensor, normed: tl.tensor, eps: tl.tensor,
    N: tl.constexpr, PADDED: tl.constexpr, ADDS: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row: total = x + y, rounded, and its root-mean-square norm. All [rows, N], weight [N].

    Without ADDS it is the norm of x.
    """
    column = tl.arange(0, PADDED)
    at, is_column = tl.program_id(0).to(tl.int64) * N + column, column < N
    sum_N = tl.load(x + at, mask=is_column, other=0.0).to(tl.float32)
    if ADDS:
        sum_N += tl.load(y + at, mask=is_column, other=0.0).to(tl.float32)
        rounded_N = sum_N.to(total.dtype.element_ty)
        tl.store(total + at, rounded_N, mask=is_column)
        sum_N = rounded_N.to(tl.float32)
    scale = tl.rsqrt(tl.sum(sum_N * sum_N, 0) / N + eps)
    weight_N = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(normed + at, (sum_N * scale * weight_N).to(normed.dtype.element_ty), mask=is_column)


@triton.jit
def _gate(both: tl.tensor, out: tl.tensor, row_stride: tl.tensor, N: tl.constexpr, IS_SILU: tl.constexpr) -> None:
    """One program for some columns of a row: activation(gate) × up. both [rows, 2 N], gate first; out [rows, N]."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
    is_column = column < N
    gate = tl.load(both + row * row_stride + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(both + row * row_stride + N + column, mask=is_column, other=0.0).to(tl.float32)
    # x × sigmoid(x) is silu; gelu by its tanh is x × sigmoid(2 × (what the tanh is taken of))
    inner = gate if IS_SILU else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = gate / (1.0 + tl.exp(-inner))
    tl.store(out + row * N + column, (active * up).to(out.dtype.element_ty), mask=is_column)


class HeadsShape(NamedTuple):
    """What `_rotate_and_store` is compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    half: int
    half_padded: int  # to a power of two
    has_norms: bool
    block_size: int
    key_block: int  # strides of the cache
    key_slot: int
    key_head: int
    value_block: int
    value_slot: int
    value_head: int


@triton.jit
def _halves(base: tl.tensor, at: tl.tensor, is_there: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """The first and the second half of some vectors, as float32; `at`: the elements of the first halves."""
    first = tl.load(base + at, mask=is_there, other=0.0).to(tl.float32)
    return first, tl.load(base + at + HALF, mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(
    base: tl.tensor, at: tl.tensor, first: tl.tensor, second: tl.tensor, is_there: tl.tensor, HALF: tl.constexpr
) -> None:
    tl.store(base + at, first.to(base.dtype.element_ty), mask=is_there)
    tl.store(base + at + HALF, second.to(base.dtype.element_ty), mask=is_there)


@triton.jit
def _rotate_and_store(
    product: tl.tensor, row_stride: tl.tensor, cos: tl.tensor, sin: tl.tensor, query_norm: tl.tensor,
    key_norm: tl.tensor, eps: tl.tensor, slots: tl.tensor, query: tl.tensor, keys: tl.tensor, values: tl.tensor,
    SHAPE: tl.constexpr,
) -> None:  # fmt: skip
    """One program for some heads of a token: norm and rotate queries and keys, store keys and values in the cache.

    product [T, (h + 2 H) D], cos and sin [T, D], norms [D], slots [T]; query [T, h, D].
    """
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, SHAPE.half_padded)[None, :]
    head = (tl.program_id(1) * _ROWS + tl.arange(0, _ROWS))[:, None]
    key_head, value_head = head - SHAPE.num_heads, head - SHAPE.num_heads - SHAPE.num_kv_heads
    is_d = d < SHAPE.half
    is_query = (key_head < 0) & is_d
    is_key = (key_head >= 0) & (value_head < 0) & is_d
    is_value = (value_head >= 0) & (value_head < SHAPE.num_kv_heads) & is_d
    at = token * row_stride + head * SHAPE.head_dim + d
    value_first, value_second = _halves(product, at, is_query | is_key | is_value, SHAPE.half)
    first, second = value_first, value_second
    if SHAPE.has_norms:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / SHAPE.head_dim
        scale = tl.rsqrt(mean + eps)[:, None]
        query_first, query_second = _halves(query_norm, d, is_d, SHAPE.half)
        key_first, key_second = _halves(key_norm, d, is_d, SHAPE.half)
        first = first * scale * tl.where(key_head < 0, query_first, key_first)
        second = second * scale * tl.where(key_head < 0, query_second, key_second)
    cos_first, cos_second = _halves(cos, token * SHAPE.head_dim + d, is_d, SHAPE.half)
    sin_first, sin_second = _halves(sin, token * SHAPE.head_dim + d, is_d, SHAPE.half)
    rotated_first = first * cos_first - second * sin_first
    rotated_second = second * cos_second + first * sin_second
    at = (token * SHAPE.num_heads + head) * SHAPE.head_dim + d
    _store_halves(query, at, rotated_first, rotated_second, is_query, SHAPE.half)
    slot = tl.load(slots + token)
    block, offset = slot // SHAPE.block_size, slot % SHAPE.block_size
    at = block * SHAPE.key_block + offset * SHAPE.key_slot + key_head * SHAPE.key_head + d
    _store_halves(keys, at, rotated_first, rotated_second, is_key, SHAPE.half)
    at = block * SHAPE.value_block + offset * SHAPE.value_slot + value_head * SHAPE.value_head + d
    _store_halves(values, at, value_first, value_second, is_value, SHAPE.half)


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of x and y, and its root-mean-square norm; all [*, N], weight [N]."""
    x, y = x.contiguous(), y.contiguous()
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch_norm(x, y, weight, total, normed, eps, adds=True)
    return total, normed


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The root-mean-square norm of x [*, N], weight [N]."""
    x = x.contiguous()
    normed = x.new_empty(x.shape)
    _launch_norm(x, x, weight, x, normed, eps, adds=False)
    return normed


def _launch_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    total: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
    adds: bool,
) -> None:
    size, padded = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    _add_rms_norm[(x.numel() // size,)](
        x, y, weight, total, normed, eps, N=size, PADDED=padded, ADDS=adds, num_warps=min(16, max(1, padded // 512))
    )


def gate(both: torch.Tensor, activation: str) -> torch.Tensor:
    """Gate and up [*, 2 N] → activation(gate) × up [*, N]."""
    rows = both.reshape(-1, both.shape[-1])
    out = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    size = out.shape[-1]
    _gate[(len(rows), triton.cdiv(size, _COLUMNS.value))](
        rows, out, rows.stride(0), N=size, IS_SILU=activation == "silu", num_warps=4
    )
    return out


class HeadNorms(NamedTuple):
    """The norms over single heads that queries and keys go through."""

    query_D: torch.Tensor
    key_D: torch.Tensor
    eps: float


def rotate_and_store(
    product: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
    slots_T: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
) -> torch.Tensor:
    """Queries, keys and values [1, T, (h + 2 H) D], cos and sin [1, T, D] → rotated queries [h, T, D].

    Keys and values are written into their slots of the cache. `norms`: of queries and keys, before they are rotated.
    """
    (_, block_size, num_kv_heads, head_dim), num_tokens = cache.keys_NbHD.shape, product.shape[1]
    query_ThD = product.new_empty(num_tokens, num_heads, head_dim)
    shape = HeadsShape(
        num_heads, num_kv_heads, head_dim, head_dim // 2, triton.next_power_of_2(head_dim // 2), norms is not None,
        block_size,
        *cache.keys_NbHD.stride()[:3], *cache.values_NbHD.stride()[:3],
    )  # fmt: skip
    query_norm, key_norm, eps = norms or HeadNorms(cos, cos, 0.0)
    _rotate_and_store[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _ROWS.value))](
        product, product.stride(1), cos.contiguous(), sin.contiguous(), query_norm, key_norm, eps, slots_T, query_ThD,
        cache.keys_NbHD, cache.values_NbHD, SHAPE=shape, num_warps=4,
    )  # fmt: skip
    return query_ThD.transpose(0, 1)
