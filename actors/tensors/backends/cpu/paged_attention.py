"""Paged attention of single-token rows on CPU, for any dtype and dimension, straight from the blocks of the cache.

B rows, a token each · H KV heads · D dimension of a key (E of a value). Sums are in float32.
"""

from typing import Any, NamedTuple

import numpy as np

from actors.tensors.attention.metadata import Indices
from actors.tensors.backends.cpu.compile import kernel
from actors.tensors.backends.cpu.kernels import HeadRows, KeysValues
from cluster.collectives.elements import exp, pointer, prefetch, round_to, to_float32


class RowTables(NamedTuple):
    """The block tables of rows, and the keys that each row sees."""

    tables: Indices  # [sequences, blocks]
    table_of: Indices  # [B], the table of a row's sequence
    positions: Indices  # [B], of the last key that a row sees
    first_keys: Indices  # [B], position of the first key that it sees


class AttentionSizes(NamedTuple):
    """The sizes and factors of one attention."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    element_bytes: int
    scaling: float
    softcap: float  # 0: none


class _Layout(NamedTuple):
    """The layout of the keys, or of the values, in the cache."""

    num_kv_heads: int
    dim: int
    block_size: int
    element_bytes: int


@kernel()
def _locate(cached: Any, table: Any, position: int, last: int, layout: _Layout) -> Any:
    """The index of a position's first element in the keys or values; prefetches the position one block later.

    The hardware cannot foresee it, as the blocks of a sequence lie anywhere.
    """
    block_size, size = layout.block_size, layout.num_kv_heads * layout.dim
    block, offset = position // block_size, position % block_size
    if position + block_size <= last:
        ahead = (table[block + 1] * block_size + offset) * size
        for i in range(ahead, ahead + size, 64 // layout.element_bytes):
            prefetch(cached, i)
    return (table[block] * block_size + offset) * size


@kernel()
def _score(queries: Any, scores: Any, keys: Any, table: Any, first: int, count: int, layout: _Layout) -> None:
    """Products of all queries [heads, D] with `count` keys from position `first` on → scores [heads, keys]."""
    num_kv_heads, dim = layout.num_kv_heads, layout.dim
    group = queries.shape[0] // num_kv_heads
    for j in range(count):
        here = _locate(keys, table, first + j, first + count - 1, layout)
        for kv_head in range(num_kv_heads):
            key = here + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                score = np.float32(0)
                for d in range(dim):
                    score += queries[head, d] * to_float32(keys[key + d])
                scores[head, j] = score


@kernel()
def softmax(scores: Any, count: int, sink: Any, softcap: float) -> None:
    """Scores of one head → weights, in place; with its sink's (an array of one logit, or none) they sum to 1."""
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
def _sum_values(weights: Any, sums: Any, values: Any, table: Any, first: int, count: int, layout: _Layout) -> None:
    """Sums of `count` values from position `first` on, weighted by [heads, keys] → [heads, E]."""
    num_kv_heads, dim = layout.num_kv_heads, layout.dim
    group = sums.shape[0] // num_kv_heads
    sums[:] = np.float32(0)
    for j in range(count):
        here = _locate(values, table, first + j, first + count - 1, layout)
        for kv_head in range(num_kv_heads):
            value = here + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                weight = weights[head, j]
                for e in range(dim):
                    sums[head, e] += weight * to_float32(values[value + e])


@kernel()
def attend_rows(
    query: HeadRows, cache: KeysValues, out: int, rows: RowTables, sinks: Any, sizes: AttentionSizes, dtype_tag: Any
) -> None:
    """Queries [B, heads, D], each row over the keys that it sees → `out` [B, heads, E], contiguous.

    `sinks`: float32 [heads], or an empty array.
    """
    query_p, keys_p, values_p = (
        pointer(query.address, dtype_tag),
        pointer(cache.keys, dtype_tag),
        pointer(cache.values, dtype_tag),
    )
    out_p = pointer(out, dtype_tag)
    num_heads, key_dim, value_dim = sizes.num_heads, sizes.key_dim, sizes.value_dim
    key_layout = _Layout(sizes.num_kv_heads, key_dim, sizes.block_size, sizes.element_bytes)
    value_layout = _Layout(sizes.num_kv_heads, value_dim, sizes.block_size, sizes.element_bytes)
    longest = (rows.positions - rows.first_keys).max() + 1
    scores = np.empty((num_heads, longest), np.float32)
    queries = np.empty((num_heads, key_dim), np.float32)
    sums = np.empty((num_heads, value_dim), np.float32)
    for row in range(len(rows.positions)):
        table, first = rows.tables[rows.table_of[row]], rows.first_keys[row]
        count = rows.positions[row] + 1 - first
        for head in range(num_heads):
            start = row * query.row_stride + head * query.head_stride
            for d in range(key_dim):
                queries[head, d] = to_float32(query_p[start + d]) * np.float32(sizes.scaling)
        _score(queries, scores, keys_p, table, first, count, key_layout)
        for head in range(num_heads):
            softmax(scores[head], count, sinks[head : head + 1], sizes.softcap)
        _sum_values(scores, sums, values_p, table, first, count, value_layout)
        for head in range(num_heads):
            start = (row * num_heads + head) * value_dim
            for e in range(value_dim):
                out_p[start + e] = round_to(sums[head, e], dtype_tag)
