"""A Triton kernel between the product of an attention block and attention: norms over heads, rotation, the cache.

T tokens of the step · h query heads · H KV heads · D their dimension. It computes in float32; norms round where the
models' own code rounds, and a rotation rounds once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.tensors.attention.metadata import LayerCache
from actors.tensors.backends.cuda.layer_kernels import Norm

_ROWS = tl.constexpr(8)  # heads of a program


class Rotation(NamedTuple):
    """Which elements of a head are rotated in pairs, and by which angles: pair i is [i × stride, the same + offset]."""

    size: int  # elements of a head that are rotated; those behind them are not
    pair_stride: int
    pair_offset: int
    angle_stride: int
    angle_offset: int


def rotations(angle_dim: int, head_dim: int) -> list[Rotation]:
    """How models rotate heads by `angle_dim` cosines and sines a token: Llama's way first."""
    half, found = angle_dim // 2, []
    if angle_dim <= head_dim and angle_dim % 2 == 0:
        found.append(Rotation(angle_dim, 1, half, 1, half))
        found.append(Rotation(angle_dim, 2, 1, 1, 0))  # GLM
        found.append(Rotation(angle_dim, 2, 1, 2, 1))  # Cohere
    if 2 * angle_dim <= head_dim:
        found.append(Rotation(2 * angle_dim, 1, angle_dim, 1, 0))  # gpt-oss
    return found


class HeadsShape(NamedTuple):
    """What `_rotate_and_store` is compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    angle_dim: int  # of a row of cosines
    rotated: int  # see Rotation
    pair_stride: int
    pair_offset: int
    angle_stride: int
    angle_offset: int
    pairs_padded: int  # to a power of two
    rest_padded: int  # elements that are not rotated, to a power of two; 0: none
    norms: int  # of queries and keys: 0 none, 1 of each head, 2 of all heads together
    rounds_first: bool  # see NormShape
    queries_padded: int  # elements of all query heads, to a power of two
    keys_padded: int
    block_size: int
    key_block: int  # strides of the cache
    key_slot: int
    key_head: int
    value_block: int
    value_slot: int
    value_head: int


@triton.jit
def _load(pointers: tl.tensor, is_there: tl.tensor) -> tl.tensor:
    return tl.load(pointers, mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers: tl.tensor, numbers: tl.tensor, is_there: tl.tensor) -> None:
    tl.store(pointers, numbers.to(pointers.dtype.element_ty), mask=is_there)


@triton.jit
def _mean_of_squares(base: tl.tensor, SIZE: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    column = tl.arange(0, PADDED)
    row = _load(base + column, column < SIZE)
    return tl.sum(row * row, 0) / SIZE


@triton.jit
def _mean(row: tl.tensor, first: tl.tensor, second: tl.tensor, is_query: tl.tensor, SHAPE: tl.constexpr) -> tl.tensor:
    """The mean of squares of each head's pairs, or of all queries of a token, or all its keys."""
    if SHAPE.norms == 1:
        return ((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / SHAPE.head_dim)[:, None]
    of_queries = _mean_of_squares(row, SHAPE.num_heads * SHAPE.head_dim, SHAPE.queries_padded)
    first_key = row + SHAPE.num_heads * SHAPE.head_dim
    of_keys = _mean_of_squares(first_key, SHAPE.num_kv_heads * SHAPE.head_dim, SHAPE.keys_padded)
    return tl.where(is_query, of_queries, of_keys)


@triton.jit
def _normed(
    x: tl.tensor, scale: tl.tensor, query_norm: tl.tensor, key_norm: tl.tensor, head: tl.tensor, d: tl.tensor,
    is_query: tl.tensor, is_key: tl.tensor, SHAPE: tl.constexpr, dtype: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Elements `d` of some heads, times their scale and weight; rounded to `dtype`, but not cast."""
    stride = SHAPE.head_dim if SHAPE.norms == 2 else 0
    weight = _load(query_norm + head * stride + d, is_query)
    weight += _load(key_norm + (head - SHAPE.num_heads) * stride + d, is_key)
    x = x * scale
    if SHAPE.rounds_first:
        x = x.to(dtype).to(tl.float32)
    return (x * weight).to(dtype).to(tl.float32)


@triton.jit
def _store_both(query: tl.tensor, key: tl.tensor, numbers: tl.tensor, is_query: tl.tensor, is_key: tl.tensor) -> None:
    _store(query, numbers, is_query)
    _store(key, numbers, is_key)


@triton.jit
def _rotate_and_store(
    product: tl.tensor, row_stride: tl.tensor, cos: tl.tensor, sin: tl.tensor, query_norm: tl.tensor,
    key_norm: tl.tensor, eps: tl.tensor, slots: tl.tensor, query: tl.tensor, keys: tl.tensor, values: tl.tensor,
    SHAPE: tl.constexpr,
) -> None:  # fmt: skip
    """One program for some heads of a token: norm and rotate queries and keys, store keys and values in the cache.

    product [T, (h + 2 H) D], cos and sin [T, angles], norms [D] or [heads × D], slots [T]; query [T, h, D].
    """
    dtype: tl.constexpr = product.dtype.element_ty
    token, pair = tl.program_id(0).to(tl.int64), tl.arange(0, SHAPE.pairs_padded)[None, :]
    head = (tl.program_id(1) * _ROWS + tl.arange(0, _ROWS))[:, None]
    key_head, value_head = head - SHAPE.num_heads, head - SHAPE.num_heads - SHAPE.num_kv_heads
    is_query, is_key = key_head < 0, (key_head >= 0) & (value_head < 0)
    is_value = (value_head >= 0) & (value_head < SHAPE.num_kv_heads)
    is_there, is_pair = is_query | is_key | is_value, pair < SHAPE.rotated // 2
    slot = tl.load(slots + token)
    block, offset = slot // SHAPE.block_size, slot % SHAPE.block_size
    at_query = query + (token * SHAPE.num_heads + head) * SHAPE.head_dim
    at_key = keys + block * SHAPE.key_block + offset * SHAPE.key_slot + key_head * SHAPE.key_head
    at_value = values + block * SHAPE.value_block + offset * SHAPE.value_slot + value_head * SHAPE.value_head
    row = product + token * row_stride
    at_head = row + head * SHAPE.head_dim
    d, e = pair * SHAPE.pair_stride, pair * SHAPE.pair_stride + SHAPE.pair_offset
    first, second = _load(at_head + d, is_there & is_pair), _load(at_head + e, is_there & is_pair)
    _store(at_value + d, first, is_value & is_pair)
    _store(at_value + e, second, is_value & is_pair)
    if SHAPE.rest_padded > 0:
        f = SHAPE.rotated + tl.arange(0, SHAPE.rest_padded)[None, :]
        is_rest = f < SHAPE.head_dim
        rest = _load(at_head + f, is_there & is_rest)
        _store(at_value + f, rest, is_value & is_rest)
    if SHAPE.norms > 0:
        mean = _mean(row, first, second, is_query, SHAPE)
        if SHAPE.norms == 1 and SHAPE.rest_padded > 0:
            mean += (tl.sum(rest * rest, 1) / SHAPE.head_dim)[:, None]
        scale, queries, of_keys = tl.rsqrt(mean + eps), is_query & is_pair, is_key & is_pair
        first = _normed(first, scale, query_norm, key_norm, head, d, queries, of_keys, SHAPE, dtype)
        second = _normed(second, scale, query_norm, key_norm, head, e, queries, of_keys, SHAPE, dtype)
        if SHAPE.rest_padded > 0:
            queries, of_keys = is_query & is_rest, is_key & is_rest
            rest = _normed(rest, scale, query_norm, key_norm, head, f, queries, of_keys, SHAPE, dtype)
    angle = token * SHAPE.angle_dim + pair * SHAPE.angle_stride
    rotated = first * _load(cos + angle, is_pair) - second * _load(sin + angle, is_pair)
    _store_both(at_query + d, at_key + d, rotated, is_query & is_pair, is_key & is_pair)
    angle += SHAPE.angle_offset
    rotated = second * _load(cos + angle, is_pair) + first * _load(sin + angle, is_pair)
    _store_both(at_query + e, at_key + e, rotated, is_query & is_pair, is_key & is_pair)
    if SHAPE.rest_padded > 0:
        _store_both(at_query + f, at_key + f, rest, is_query & is_rest, is_key & is_rest)


class HeadNorms(NamedTuple):
    """The norms that queries and keys go through before they are rotated: of single heads, or of all together."""

    query: Norm  # of one eps, and rounding alike
    key: Norm


def rotate_and_store(
    product: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotation: Rotation,
    norms: HeadNorms | None,
    slots_T: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
) -> torch.Tensor:
    """Queries, keys and values [1, T, (h + 2 H) D], cos and sin [1, T, angles] → rotated queries [h, T, D].

    Keys and values are written into their slots of the cache.
    """
    (_, block_size, num_kv_heads, head_dim), num_tokens = cache.keys_NbHD.shape, product.shape[1]
    query_ThD = product.new_empty(num_tokens, num_heads, head_dim)
    rest = head_dim - rotation.size
    query_norm, key_norm = norms or HeadNorms(Norm(cos, 0.0), Norm(cos, 0.0))
    kind = 0 if norms is None else 1 if len(query_norm.weight_N) == head_dim else 2
    shape = HeadsShape(
        num_heads, num_kv_heads, head_dim, cos.shape[-1], *rotation, triton.next_power_of_2(rotation.size // 2),
        triton.next_power_of_2(rest) if rest else 0, kind,
        query_norm.rounds_first, triton.next_power_of_2(num_heads * head_dim),
        triton.next_power_of_2(num_kv_heads * head_dim), block_size, *cache.keys_NbHD.stride()[:3],
        *cache.values_NbHD.stride()[:3],
    )  # fmt: skip
    _rotate_and_store[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _ROWS.value))](
        product, product.stride(1), cos.contiguous(), sin.contiguous(), query_norm.weight_N, key_norm.weight_N,
        query_norm.eps, slots_T, query_ThD, cache.keys_NbHD, cache.values_NbHD, SHAPE=shape, num_warps=4,
    )  # fmt: skip
    return query_ThD.transpose(0, 1)
