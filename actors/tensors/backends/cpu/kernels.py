"""Small kernels for CPU, compiled on first use and kept on disk: what torch would do in several passes over memory.

They take addresses and strides (in elements), so that a call costs a microsecond and views need no copy. `dtype_tag` is a
scalar of the element type: uint16 stands for bfloat16, float32 for itself. Sums are in float32.
T tokens · B decode rows · H KV heads · D dimension of a key (E of a value).
"""

from typing import Any

import numpy as np

from actors.tensors.backends.cpu.compile import kernel
from cluster.collectives.elements import DTYPE_TAGS, exp, pointer, prefetch, round_to, to_float32

__all__ = ["DTYPE_TAGS", "attend_decode", "rms_norm", "rotate", "rotate_and_store", "silu_mul", "weigh"]


@kernel()
def rms_norm(
    x: int, weight: int, out: int, num_rows: int, size: int, x_stride: int, out_stride: int, eps: float, dtype_tag: Any
) -> None:
    """Rows [num_rows, size], normed and times the weight [size]; rounded between the two, as Transformers does."""
    x_p, weight_p, out_p = pointer(x, dtype_tag), pointer(weight, dtype_tag), pointer(out, dtype_tag)
    for row in range(num_rows):
        first, first_out = row * x_stride, row * out_stride
        squares = np.float32(0)
        for i in range(size):
            value = to_float32(x_p[first + i])
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + np.float32(eps))
        for i in range(size):
            normed = to_float32(round_to(to_float32(x_p[first + i]) * scale, dtype_tag))
            out_p[first_out + i] = round_to(normed * to_float32(weight_p[i]), dtype_tag)


@kernel()
def silu_mul(
    gate: int, up: int, out: int, num_rows: int, size: int, gate_stride: int, up_stride: int, dtype_tag: Any
) -> None:
    """silu(gate) × up, rows [num_rows, size]; `out` is contiguous."""
    gate_p, up_p, out_p = pointer(gate, dtype_tag), pointer(up, dtype_tag), pointer(out, dtype_tag)
    for row in range(num_rows):
        first_gate, first_up, first_out = row * gate_stride, row * up_stride, row * size
        for i in range(size):
            x = to_float32(gate_p[first_gate + i])
            activated = to_float32(round_to(x / (np.float32(1) + exp(-x)), dtype_tag))
            out_p[first_out + i] = round_to(activated * to_float32(up_p[first_up + i]), dtype_tag)


@kernel()
def _rotate_head(
    x: Any, first: int, out: Any, first_out: int, cos: Any, sin: Any, angle: int, half: int, dtype_tag: Any
) -> None:
    """One head of one token, in Llama's order: number i turns with number i + half."""
    for i in range(half):
        a, b = to_float32(x[first + i]), to_float32(x[first + half + i])
        out[first_out + i] = round_to(a * to_float32(cos[angle + i]) - b * to_float32(sin[angle + i]), dtype_tag)
        turned = b * to_float32(cos[angle + half + i]) + a * to_float32(sin[angle + half + i])
        out[first_out + half + i] = round_to(turned, dtype_tag)


@kernel()
def rotate(
    x: int, cos: int, sin: int, out: int, num_tokens: int, num_heads: int, size: int, x_strides: Any, dtype_tag: Any
) -> None:
    """Rotary embedding in Llama's order: x [T, heads, D] by strides (token, head), cos and sin [T, D] → contiguous."""
    x_p, cos_p, sin_p, out_p = (
        pointer(x, dtype_tag),
        pointer(cos, dtype_tag),
        pointer(sin, dtype_tag),
        pointer(out, dtype_tag),
    )
    half = size // 2
    for token in range(num_tokens):
        angle = token * size
        for head in range(num_heads):
            first = token * x_strides[0] + head * x_strides[1]
            first_out = (token * num_heads + head) * size
            _rotate_head(x_p, first, out_p, first_out, cos_p, sin_p, angle, half, dtype_tag)


@kernel()
def rotate_and_store(
    product: int, cos: int, sin: int, query: int, keys: int, values: int, slots: Any, sizes: Any, dtype_tag: Any
) -> None:
    """Of each token's row of queries, keys and values: rotate the first two, put the last two into the cache.

    Product [T, (heads + 2 H) × D] and cos and sin [T, D] → query [T, heads, D], and in the slots [T] of the cache keys
    and values [slots, H, D]. `sizes`: (heads, H, D).
    """
    num_heads, num_kv_heads, size = sizes
    product_p, query_p, keys_p = pointer(product, dtype_tag), pointer(query, dtype_tag), pointer(keys, dtype_tag)
    cos_p, sin_p, values_p = pointer(cos, dtype_tag), pointer(sin, dtype_tag), pointer(values, dtype_tag)
    half = size // 2
    for token in range(len(slots)):
        angle, row = token * size, token * (num_heads + 2 * num_kv_heads) * size
        for head in range(num_heads + num_kv_heads):
            first = row + head * size
            is_query = head < num_heads
            out_p = query_p if is_query else keys_p
            place = token * num_heads + head if is_query else slots[token] * num_kv_heads + head - num_heads
            _rotate_head(product_p, first, out_p, place * size, cos_p, sin_p, angle, half, dtype_tag)
        first, out = row + (num_heads + num_kv_heads) * size, slots[token] * num_kv_heads * size
        for i in range(num_kv_heads * size):
            values_p[out + i] = product_p[first + i]


@kernel()
def _locate(cached: Any, tables: Any, position: int, last: int, cache: Any) -> Any:
    """Where a position's heads begin in keys or values; asks early for those that lie a block further.

    The blocks of a sequence lie anywhere, and no hardware guesses where.
    """
    num_kv_heads, dim, block_size, element_bytes = cache
    block, offset, size = position // block_size, position % block_size, num_kv_heads * dim
    if position + block_size <= last:
        ahead = (tables[block + 1] * block_size + offset) * size
        for i in range(ahead, ahead + size, 64 // element_bytes):
            prefetch(cached, i)
    return (tables[block] * block_size + offset) * size


@kernel()
def _score(queries: Any, scores: Any, keys: Any, tables: Any, first: int, count: int, cache: Any) -> None:
    """Products of all queries [heads, D] with `count` keys from position `first` on → scores [heads, keys]."""
    num_kv_heads, dim, _, _ = cache
    group = queries.shape[0] // num_kv_heads
    for j in range(count):
        here = _locate(keys, tables, first + j, first + count - 1, cache)
        for kv_head in range(num_kv_heads):
            place = here + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                score = np.float32(0)
                for d in range(dim):
                    score += queries[head, d] * to_float32(keys[place + d])
                scores[head, j] = score


@kernel()
def weigh(scores: Any, count: int, sink: Any, softcap: float) -> None:
    """Scores of one head → weights that sum to 1, together with that of its sink: an array of one logit, or of none."""
    cap = np.float32(softcap)
    if cap > 0:
        for j in range(count):
            scores[j] = np.tanh(scores[j] / cap) * cap
    highest = sink[0] if len(sink) else scores[0]
    for j in range(count):
        highest = max(highest, scores[j])
    total = exp(sink[0] - highest) if len(sink) else np.float32(0)
    for j in range(count):
        scores[j] = exp(scores[j] - highest)
        total += scores[j]
    for j in range(count):
        scores[j] /= total


@kernel()
def _sum_values(weights: Any, sums: Any, values: Any, tables: Any, first: int, count: int, cache: Any) -> None:
    """Values weighted [heads, keys] and summed → [heads, E]."""
    num_kv_heads, dim, _, _ = cache
    group = sums.shape[0] // num_kv_heads
    sums[:] = np.float32(0)
    for j in range(count):
        here = _locate(values, tables, first + j, first + count - 1, cache)
        for kv_head in range(num_kv_heads):
            place = here + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                weight = weights[head, j]
                for e in range(dim):
                    sums[head, e] += weight * to_float32(values[place + e])


@kernel()
def attend_decode(
    addresses: Any,
    rows: Any,
    sinks: Any,
    sizes: Any,
    query_strides: Any,
    scaling: float,
    softcap: float,
    dtype_tag: Any,
) -> None:
    """One query a row over the keys that it sees, straight out of the blocks of the cache.

    `addresses`: of queries [B, heads, D] by strides (row, head), keys [blocks, block size, H, D], values [blocks, block
    size, H, E], and of what is filled, [B, heads, E]. `rows`, arrays of int64: tables [sequences, blocks], and of each
    row its place among them, its position, which is the last that it sees, and the first that it sees.
    `sinks`: float32 [heads], or nothing. `sizes`: (heads, H, D, E, block size, bytes of an element). `softcap` 0: none.
    """
    query, keys, values, out = addresses
    tables, places, positions, first_keys = rows
    num_heads, num_kv_heads, key_dim, value_dim, block_size, element_bytes = sizes
    query_p, keys_p, values_p = pointer(query, dtype_tag), pointer(keys, dtype_tag), pointer(values, dtype_tag)
    out_p = pointer(out, dtype_tag)
    longest = (positions - first_keys).max() + 1
    scores = np.empty((num_heads, longest), np.float32)
    queries = np.empty((num_heads, key_dim), np.float32)
    sums = np.empty((num_heads, value_dim), np.float32)
    for row in range(len(places)):
        table, first, count = tables[places[row]], first_keys[row], positions[row] + 1 - first_keys[row]
        for head in range(num_heads):
            place = row * query_strides[0] + head * query_strides[1]
            for d in range(key_dim):
                queries[head, d] = to_float32(query_p[place + d]) * np.float32(scaling)
        _score(queries, scores, keys_p, table, first, count, (num_kv_heads, key_dim, block_size, element_bytes))
        for head in range(num_heads):
            weigh(scores[head], count, sinks[head : head + 1], softcap)
        _sum_values(scores, sums, values_p, table, first, count, (num_kv_heads, value_dim, block_size, element_bytes))
        for head in range(num_heads):
            place = (row * num_heads + head) * value_dim
            for e in range(value_dim):
                out_p[place + e] = round_to(sums[head, e], dtype_tag)
