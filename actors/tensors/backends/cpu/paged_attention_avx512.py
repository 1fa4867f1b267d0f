"""Paged attention of single-token rows by VDPBF16PS (AVX-512): 16 keys at a time, straight from the cache's blocks.

As `paged_attention.attend_rows`, for bfloat16 and sizes that fill vectors. Its speed is that of the memory.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from actors.decisions.model.spec import AttentionSpec
from actors.tensors.backends.cpu.avx512 import F32, I64, SUMS, WIDTH, Writer, has_dot_product
from actors.tensors.backends.cpu.compile import kernel
from actors.tensors.backends.cpu.kernels import HeadRows, KeysValues
from actors.tensors.backends.cpu.paged_attention import AttentionSizes, RowTables, softmax
from cluster.collectives.elements import pointer, round_to

# Up to so many keys, a prompt computed as single-token rows is as fast as by torch; with few keys, twice as fast
LONGEST = 4096
_VALUES_AT_ONCE = 4  # vectors of a value: their sums stay in registers over all keys of a tile


def why_not(spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> str | None:
    """Why these kernels do not compute an attention on this CPU; None: they do."""
    if not has_dot_product():
        return "this CPU has no VDPBF16PS"
    if dtype != torch.bfloat16:
        return f"VDPBF16PS multiplies bfloat16, not {str(dtype).removeprefix('torch.')}"
    if spec.key_dim % (2 * WIDTH) or spec.value_dim % (_VALUES_AT_ONCE * WIDTH):
        wanted = f"keys of a multiple of {2 * WIDTH} and values of a multiple of {_VALUES_AT_ONCE * WIDTH} numbers"
        return f"heads of {spec.key_dim} and {spec.value_dim} numbers do not fill its vectors: it takes {wanted}"
    if block_size % WIDTH:
        return f"cache.block_size {block_size} is no multiple of {WIDTH}"
    return None


class _Layout(NamedTuple):
    """The heads of a row, and the layout of the keys, or of the values, in the cache."""

    num_heads: int
    group: int  # queries to a KV head
    dim: int
    step: int  # bytes from position to position
    block_size: int
    longest: int  # scores of a head: keys of whole tiles


class _RowKeys(NamedTuple):
    """The keys that a row sees, in tiles of WIDTH positions."""

    table: Any  # its block table
    first_tile: int
    end_tile: int
    first: int  # the first key, counted from the start of the first tile
    end: int  # behind the last key, counted the same way


@intrinsic
def _score(
    typing_context: Any, query: Any, keys: Any, key_step: Any, num_parts: Any, scores: Any, ahead: Any, ahead_step: Any
) -> Any:
    """One query by 16 keys, `key_step` bytes apart, in parts of 32 numbers → 16 float32 scores; by addresses.

    It prefetches 16 lines from `ahead` on, `ahead_step` bytes apart.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, key_step, num_parts, scores, ahead, ahead_step = arguments
        writer = Writer(builder)
        rows = [writer.offset(keys, key_step, I64(key)) for key in range(WIDTH)]
        for key in range(WIDTH):
            writer.prefetch(writer.pointer_to(writer.offset(ahead, ahead_step, I64(key))))

        def add(part: Any, sums: list[Any]) -> list[Any]:
            numbers = writer.load_pairs(writer.pointer_to(query, part, 4 * WIDTH))
            loaded = (writer.load_pairs(writer.pointer_to(row, part, 4 * WIDTH)) for row in rows)
            return [writer.add_dot(sum_, numbers, key) for sum_, key in zip(sums, loaded, strict=True)]

        summed = writer.loop(num_parts, [SUMS([0.0] * WIDTH)] * WIDTH, add)
        builder.store(writer.horizontal_sums(summed), writer.pointer_to(scores), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _add_values_of(num_heads: int) -> Any:
    """Make the function that adds values for `num_heads` heads, which share a KV head."""

    @intrinsic
    def add_values(
        typing_context: Any, weights: Any, weight_step: Any, values: Any, value_step: Any, num_values: Any, sums: Any,
        sum_step: Any, ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        """Add to each head's 64 float32 sums the values, `value_step` bytes apart, times their float32 weights.

        All are addresses. With each value it prefetches the line at `ahead`, which advances by `ahead_step`.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, weight_step, values, value_step, num_values, sums, sum_step, ahead, ahead_step = arguments
            writer = Writer(builder)
            heads, parts = range(num_heads), range(_VALUES_AT_ONCE)
            of_heads = [writer.offset(weights, weight_step, I64(head)) for head in heads]
            targets = [
                writer.pointer_to(writer.offset(sums, sum_step, I64(head)), first=4 * WIDTH * part)
                for head in heads
                for part in parts
            ]

            def add(index: Any, sums: list[Any]) -> list[Any]:
                writer.prefetch(writer.pointer_to(writer.offset(ahead, ahead_step, index)))
                value = writer.offset(values, value_step, index)
                numbers = [writer.load_as_float32(writer.pointer_to(value, first=2 * WIDTH * part)) for part in parts]
                factors = [
                    writer.broadcast(builder.load(writer.pointer_to(of_head, index, 4), typ=F32, align=4), SUMS)
                    for of_head in of_heads
                ]
                return [
                    writer.add_product(sums[head * _VALUES_AT_ONCE + part], factors[head], numbers[part])
                    for head in heads
                    for part in parts
                ]

            before = [builder.load(target, typ=SUMS, align=4) for target in targets]
            for target, sum_ in zip(targets, writer.loop(num_values, before, add), strict=True):
                builder.store(sum_, target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return add_values


_add_values, _add_values_of_two = _add_values_of(1), _add_values_of(2)


@kernel()
def _tile_offset(table: Any, tile: int, layout: _Layout) -> int:
    """The offset in bytes of a tile's first key or value in the cache."""
    first, block_size = tile * WIDTH, layout.block_size
    return (int(table[first // block_size]) * block_size + first % block_size) * layout.step


@kernel()
def _score_row(
    query: int, query_step: int, keys: int, scores: int, row: _RowKeys, layout: _Layout, next_read: int
) -> None:
    """All heads of a row by all tiles of keys that it sees → scores [heads, `longest`].

    By addresses; `query_step`: bytes from head to head. `next_read` is prefetched with the last tile.
    """
    first_tile, end_tile, dim, key_step = row.first_tile, row.end_tile, layout.dim, layout.step
    share = key_step // layout.num_heads
    for tile in range(first_tile, end_tile):
        here = keys + _tile_offset(row.table, tile, layout)
        ahead = keys + _tile_offset(row.table, tile + 1, layout) if tile + 1 < end_tile else next_read
        for head in range(layout.num_heads):
            target = scores + 4 * (head * layout.longest + (tile - first_tile) * WIDTH)
            key, prefetched = here + head // layout.group * 2 * dim, ahead + head * WIDTH * share
            _score(query + head * query_step, key, key_step, dim // 32, target, prefetched, share)


@kernel()
def _sum_row(weights: int, values: int, sums: int, row: _RowKeys, layout: _Layout, next_read: int) -> None:
    """The values of the tiles that a row sees, weighted and added to all heads' sums [heads, E].

    By addresses. Values of keys that the row does not see are not read: they may be NaN. `next_read` is prefetched with
    the last tile.
    """
    first_tile, end_tile, dim, value_step = row.first_tile, row.end_tile, layout.dim, layout.step
    num_heads, group, longest = layout.num_heads, layout.group, layout.longest
    at_once = 2 if group % 2 == 0 else 1
    num_parts = dim // (_VALUES_AT_ONCE * WIDTH)
    share = value_step * at_once // (num_heads * num_parts)
    for tile in range(first_tile, end_tile):
        skip = row.first if tile == first_tile else 0
        count = min(WIDTH, row.end - (tile - first_tile) * WIDTH) - skip
        here = values + _tile_offset(row.table, tile, layout) + skip * value_step
        ahead = values + _tile_offset(row.table, tile + 1, layout) if tile + 1 < end_tile else next_read
        for head in range(0, num_heads, at_once):
            of_head = weights + 4 * (head * longest + (tile - first_tile) * WIDTH + skip)
            for part in range(num_parts):
                first = part * _VALUES_AT_ONCE * WIDTH
                value, target = here + 2 * (head // group * dim + first), sums + 4 * (head * dim + first)
                if at_once == 2:
                    _add_values_of_two(of_head, 4 * longest, value, value_step, count, target, 4 * dim, ahead, share)
                else:
                    _add_values(of_head, 4 * longest, value, value_step, count, target, 4 * dim, ahead, share)
                ahead += WIDTH * share


@kernel()
def attend_rows(
    query: HeadRows, cache: KeysValues, out: int, rows: RowTables, sinks: Any, sizes: AttentionSizes, dtype_tag: Any
) -> None:
    """See `paged_attention.attend_rows`."""
    num_heads, value_dim, block_size = sizes.num_heads, sizes.value_dim, sizes.block_size
    group, row_bytes = num_heads // sizes.num_kv_heads, sizes.element_bytes * sizes.num_kv_heads
    positions, first_keys = rows.positions, rows.first_keys
    first_tiles, end_tiles = first_keys // WIDTH, positions // WIDTH + 1
    longest = (end_tiles - first_tiles).max() * WIDTH
    scores, sums = np.empty((num_heads, longest), np.float32), np.empty((num_heads, value_dim), np.float32)
    out_p = pointer(out, dtype_tag)
    key_layout = _Layout(num_heads, group, sizes.key_dim, row_bytes * sizes.key_dim, block_size, longest)
    value_layout = _Layout(num_heads, group, value_dim, row_bytes * value_dim, block_size, longest)
    for i in range(len(positions)):
        table, first = rows.tables[rows.table_of[i]], first_keys[i] % WIDTH
        count = positions[i] + 1 - first_keys[i]
        row = _RowKeys(table, first_tiles[i], end_tiles[i], first, first + count)
        of_row, weights = query.address + 2 * i * query.row_stride, scores.ctypes.data
        next_read = cache.values + _tile_offset(table, row.first_tile, value_layout)
        _score_row(of_row, 2 * query.head_stride, cache.keys, weights, row, key_layout, next_read)
        for head in range(num_heads):
            of_head = scores[head, row.first : row.end]
            for j in range(count):
                of_head[j] *= np.float32(sizes.scaling)
            softmax(of_head, count, sinks[head : head + 1], sizes.softcap)
        sums[:] = np.float32(0)
        next_row = min(i + 1, len(positions) - 1)
        next_table = rows.tables[rows.table_of[next_row]]
        next_read = cache.keys + _tile_offset(next_table, first_tiles[next_row], key_layout)
        _sum_row(weights, cache.values, sums.ctypes.data, row, value_layout, next_read)
        for head in range(num_heads):
            start = (i * num_heads + head) * value_dim
            for e in range(value_dim):
                out_p[start + e] = round_to(sums[head, e], dtype_tag)
