"""Small CPU kernels, one pass over memory each where torch takes several: norms, gated activations, rotary embeddings.

They take addresses and strides (in elements), so that a call costs a microsecond and views need no copy. `dtype_tag` is
a scalar that stands for the element type: uint16 for bfloat16, float32 for float32. Sums are in float32.
T tokens · H KV heads · D dimension of a head.
"""

from typing import Any, NamedTuple

import numpy as np

from actors.tensors.backends.cpu.compile import kernel
from cluster.collectives.elements import DTYPE_TAGS, exp, pointer, round_to, to_float32

__all__ = ["DTYPE_TAGS", "rms_norm", "rotate", "rotate_and_store", "silu_mul"]


class Rows(NamedTuple):
    """A matrix whose rows are contiguous."""

    address: int
    stride: int  # elements from row to row


class HeadRows(NamedTuple):
    """Rows of heads; each head is contiguous."""

    address: int
    row_stride: int  # elements from row to row
    head_stride: int  # elements from head to head


class CosSin(NamedTuple):
    """Addresses of the cosines and sines of a rotary embedding, one row a token."""

    cos: int
    sin: int


class KeysValues(NamedTuple):
    """Addresses of an attention's part of the KV cache."""

    keys: int
    values: int


class Heads(NamedTuple):
    """How a row of queries, keys and values is divided."""

    num_heads: int
    num_kv_heads: int
    dim: int


@kernel()
def rms_norm(
    x: Rows, weight: int, out: Rows, num_rows: int, size: int, eps: float, rounds_first: bool, dtype_tag: Any
) -> None:
    """Rows [num_rows, size], normalized and times the weight [size]; `rounds_first`: rounded between the two, too."""
    x_p, weight_p = pointer(x.address, dtype_tag), pointer(weight, dtype_tag)
    out_p = pointer(out.address, dtype_tag)
    for row in range(num_rows):
        first, first_out = row * x.stride, row * out.stride
        squares = np.float32(0)
        for i in range(size):
            value = to_float32(x_p[first + i])
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + np.float32(eps))
        for i in range(size):
            normed = to_float32(x_p[first + i]) * scale
            if rounds_first:
                normed = to_float32(round_to(normed, dtype_tag))
            out_p[first_out + i] = round_to(normed * to_float32(weight_p[i]), dtype_tag)


@kernel()
def silu_mul(gate: Rows, up: Rows, out: int, num_rows: int, size: int, dtype_tag: Any) -> None:
    """silu(gate) × up, rows [num_rows, size]; `out` is contiguous."""
    gate_p, up_p = pointer(gate.address, dtype_tag), pointer(up.address, dtype_tag)
    out_p = pointer(out, dtype_tag)
    for row in range(num_rows):
        first_gate, first_up, first_out = row * gate.stride, row * up.stride, row * size
        for i in range(size):
            x = to_float32(gate_p[first_gate + i])
            activated = to_float32(round_to(x / (np.float32(1) + exp(-x)), dtype_tag))
            out_p[first_out + i] = round_to(activated * to_float32(up_p[first_up + i]), dtype_tag)


@kernel()
def _rotate_head(
    x: Any, first: int, out: Any, first_out: int, cos: Any, sin: Any, angle: int, half: int, dtype_tag: Any
) -> None:
    """Rotate one head of one token in Llama's order: element i pairs with element i + half."""
    for i in range(half):
        a, b = to_float32(x[first + i]), to_float32(x[first + half + i])
        out[first_out + i] = round_to(a * to_float32(cos[angle + i]) - b * to_float32(sin[angle + i]), dtype_tag)
        turned = b * to_float32(cos[angle + half + i]) + a * to_float32(sin[angle + half + i])
        out[first_out + half + i] = round_to(turned, dtype_tag)


@kernel()
def rotate(x: HeadRows, angles: CosSin, out: int, num_tokens: int, num_heads: int, size: int, dtype_tag: Any) -> None:
    """Rotary embedding in Llama's order: x [T, heads, D], angles [T, D] → contiguous [T, heads, D]."""
    x_p, out_p = pointer(x.address, dtype_tag), pointer(out, dtype_tag)
    cos_p, sin_p = pointer(angles.cos, dtype_tag), pointer(angles.sin, dtype_tag)
    half = size // 2
    for token in range(num_tokens):
        angle = token * size
        for head in range(num_heads):
            first = token * x.row_stride + head * x.head_stride
            first_out = (token * num_heads + head) * size
            _rotate_head(x_p, first, out_p, first_out, cos_p, sin_p, angle, half, dtype_tag)


@kernel()
def rotate_and_store(
    product: int, angles: CosSin, query: int, cache: KeysValues, slots: Any, heads: Heads, dtype_tag: Any
) -> None:
    """Split each token's row into queries, keys and values, rotate the first two, and write the last two to the cache.

    Product [T, (heads + 2 H) × D] and angles [T, D] → query [T, heads, D], and in the slots [T] of the cache keys and
    values [slots, H, D].
    """
    num_heads, num_kv_heads, size = heads.num_heads, heads.num_kv_heads, heads.dim
    product_p, query_p = pointer(product, dtype_tag), pointer(query, dtype_tag)
    keys_p, values_p = pointer(cache.keys, dtype_tag), pointer(cache.values, dtype_tag)
    cos_p, sin_p = pointer(angles.cos, dtype_tag), pointer(angles.sin, dtype_tag)
    half = size // 2
    for token in range(len(slots)):
        angle, row = token * size, token * (num_heads + 2 * num_kv_heads) * size
        for head in range(num_heads + num_kv_heads):
            first = row + head * size
            is_query = head < num_heads
            out_p = query_p if is_query else keys_p
            target = token * num_heads + head if is_query else slots[token] * num_kv_heads + head - num_heads
            _rotate_head(product_p, first, out_p, target * size, cos_p, sin_p, angle, half, dtype_tag)
        first, out = row + (num_heads + num_kv_heads) * size, slots[token] * num_kv_heads * size
        for i in range(num_kv_heads * size):
            values_p[out + i] = product_p[first + i]
