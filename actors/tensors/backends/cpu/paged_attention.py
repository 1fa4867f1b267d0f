"""Paged attention of single tokens on CPU, for any dtype and dimension: keys and values are read where they lie.

B rows, a token each · H KV heads · D dimension of a key (E of a value). Sums are in float32.
"""

from typing import Any, NamedTuple

import numpy as np

from actors.tensors.attention.metadata import Indices
from actors.tensors.backends.cpu.compile import kernel
from actors.tensors.backends.cpu.kernels import HeadRows, KeysValues
from cluster.collectives.elements import exp, pointer, prefetch, round_to, to_float32


class RowTables(NamedTuple):
    """Where each row's keys lie."""

    tables: Indices  # [sequences, blocks]
    table_of: Indices  # [B], a row's sequence among the tables
    positions: Indices  # [B], of the last key that it sees
    first_keys: Indices  # [B], and of the first


class AttentionSizes(NamedTuple):
    """What an attention computes with."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    element_bytes: int
    scaling: float
    softcap: float  # 0: none


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
def softmax(scores: Any, count: int, sink: Any, softcap: float) -> None:
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
    query: HeadRows, cache: KeysValues, out: int, rows: RowTables, sinks: Any, sizes: AttentionSizes, dtype_tag: Any
) -> None:
    """One query a row, [B, heads, D], over the keys that it sees, straight out of the blocks → `out` [B, heads, E].

    `sinks`: float32 [heads], or nothing.
    """
    query_p, keys_p, values_p = (
        pointer(query.address, dtype_tag),
        pointer(cache.keys, dtype_tag),
        pointer(cache.values, dtype_tag),
    )
    out_p = pointer(out, dtype_tag)
    num_heads, key_dim, value_dim = sizes.num_heads, sizes.key_dim, sizes.value_dim
    key_layout = sizes.num_kv_heads, key_dim, sizes.block_size, sizes.element_bytes
    value_layout = sizes.num_kv_heads, value_dim, sizes.block_size, sizes.element_bytes
    longest = (rows.positions - rows.first_keys).max() + 1
    scores = np.empty((num_heads, longest), np.float32)
    queries = np.empty((num_heads, key_dim), np.float32)
    sums = np.empty((num_heads, value_dim), np.float32)
    for row in range(len(rows.positions)):
        table, first = rows.tables[rows.table_of[row]], rows.first_keys[row]
        count = rows.positions[row] + 1 - first
        for head in range(num_heads):
            place = row * query.row_stride + head * query.head_stride
            for d in range(key_dim):
                queries[head, d] = to_float32(query_p[place + d]) * np.float32(sizes.scaling)
        _score(queries, scores, keys_p, table, first, count, key_layout)
        for head in range(num_heads):
            softmax(scores[head], count, sinks[head : head + 1], sizes.softcap)
        _sum_values(scores, sums, values_p, table, first, count, value_layout)
        for head in range(num_heads):
            place = (row * num_heads + head) * value_dim
            for e in range(value_dim):
                out_p[place + e] = round_to(sums[head, e], dtype_tag)
