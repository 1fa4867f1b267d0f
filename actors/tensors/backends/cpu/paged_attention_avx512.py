"""Paged attention of single tokens by VDPBF16PS (AVX-512): 16 keys at a time, straight out of the blocks of the cache.

As `paged_attention.attend_decode`, for bfloat16 and sizes that fill vectors: as fast as the memory is.
"""

from typing import Any

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

# Up to so many keys a prompt's tokens are as fast one by one as by torch, with few keys twice as fast
LONGEST = 4096
_VALUES_AT_ONCE = 4  # vectors of a value: its sums stay in registers while the keys go by


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


@intrinsic
def _score(
    typing_context: Any, query: Any, keys: Any, key_step: Any, num_parts: Any, scores: Any, ahead: Any, ahead_step: Any
) -> Any:
    """One query by 16 keys, `key_step` bytes apart, in parts of 32 numbers → 16 float32 scores; addresses.

    Meanwhile it asks for 16 lines from `ahead` on, `ahead_step` bytes apart.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, key_step, num_parts, scores, ahead, ahead_step = arguments
        writer = Writer(builder)
        rows = [writer.moved(keys, key_step, I64(key)) for key in range(WIDTH)]
        for key in range(WIDTH):
            writer.ask_for(writer.at(writer.moved(ahead, ahead_step, I64(key))))

        def add(part: Any, sums: list[Any]) -> list[Any]:
            numbers = writer.load_pairs(writer.at(query, part, 4 * WIDTH))
            loaded = (writer.load_pairs(writer.at(row, part, 4 * WIDTH)) for row in rows)
            return [writer.add_dot(sum_, numbers, key) for sum_, key in zip(sums, loaded, strict=True)]

        summed = writer.loop(num_parts, [SUMS([0.0] * WIDTH)] * WIDTH, add)
        builder.store(writer.sums_within(summed), writer.at(scores), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _adding(num_heads: int) -> Any:
    """A function for so many heads that share their values."""

    @intrinsic
    def add_values(
        typing_context: Any, weights: Any, weight_step: Any, values: Any, value_step: Any, num_values: Any, sums: Any,
        sum_step: Any, ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        """To each head's 64 float32 sums, values `value_step` bytes apart, each times its float32 weight; addresses.

        With each value it asks for a line from `ahead` on, `ahead_step` bytes further for the next one.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, weight_step, values, value_step, num_values, sums, sum_step, ahead, ahead_step = arguments
            writer = Writer(builder)
            heads, parts = range(num_heads), range(_VALUES_AT_ONCE)
            of_heads = [writer.moved(weights, weight_step, I64(head)) for head in heads]
            targets = [
                writer.at(writer.moved(sums, sum_step, I64(head)), first=4 * WIDTH * part)
                for head in heads
                for part in parts
            ]

            def add(index: Any, sums: list[Any]) -> list[Any]:
                writer.ask_for(writer.at(writer.moved(ahead, ahead_step, index)))
                value = writer.moved(values, value_step, index)
                parts_float32 = [writer.load_wide(writer.at(value, first=2 * WIDTH * part)) for part in parts]
                factors = [
                    writer.everywhere(builder.load(writer.at(of_head, index, 4), typ=F32, align=4), SUMS)
                    for of_head in of_heads
                ]
                return [
                    writer.add_product(sums[head * _VALUES_AT_ONCE + part], factors[head], parts_float32[part])
                    for head in heads
                    for part in parts
                ]

            before = [builder.load(target, typ=SUMS, align=4) for target in targets]
            for target, sum_ in zip(targets, writer.loop(num_values, before, add), strict=True):
                builder.store(sum_, target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return add_values


_add_values, _add_values_of_two = _adding(1), _adding(2)


@kernel()
def _place(tables: Any, tile: int, block_size: int) -> int:
    """The slot of a tile's first key."""
    first = tile * WIDTH
    return int(tables[first // block_size]) * block_size + first % block_size


@kernel()
def _score_row(
    query: int, query_step: int, keys: int, ahead: int, scores: int, seen: Any, table: Any, sizes: Any
) -> None:
    """All heads of a row by all tiles of keys that it sees → scores [heads, `longest`]; addresses, steps in bytes."""
    num_heads, group, dim, key_step, block_size, longest = sizes
    first_tile, end_tile = seen
    share = key_step // num_heads
    for tile in range(first_tile, end_tile):
        here = keys + _place(table, tile, block_size) * key_step
        following = keys + _place(table, tile + 1, block_size) * key_step if tile + 1 < end_tile else ahead
        for head in range(num_heads):
            target = scores + 4 * (head * longest + (tile - first_tile) * WIDTH)
            asked = following + head * WIDTH * share
            _score(query + head * query_step, here + head // group * 2 * dim, key_step, dim // 32, target, asked, share)


@kernel()
def _sum_row(
    weights: int, values: int, ahead: int, sums: int, seen: Any, skipped: int, end: int, table: Any, sizes: Any
) -> None:
    """All heads' values of the tiles that a row sees, weighted → sums [heads, E]; addresses.

    The first `skipped` and those from `end` on are not read: they may be anything.
    """
    num_heads, group, dim, value_step, block_size, longest = sizes
    first_tile, end_tile = seen
    at_once = 2 if group % 2 == 0 else 1
    num_parts = dim // (_VALUES_AT_ONCE * WIDTH)
    share = value_step * at_once // (num_heads * num_parts)
    for tile in range(first_tile, end_tile):
        skip = skipped if tile == first_tile else 0
        count = min(WIDTH, end - (tile - first_tile) * WIDTH) - skip
        here = values + _place(table, tile, block_size) * value_step + skip * value_step
        asked = values + _place(table, tile + 1, block_size) * value_step if tile + 1 < end_tile else ahead
        for head in range(0, num_heads, at_once):
            of_head = weights + 4 * (head * longest + (tile - first_tile) * WIDTH + skip)
            for part in range(num_parts):
                first = part * _VALUES_AT_ONCE * WIDTH
                place, target = here + 2 * (head // group * dim + first), sums + 4 * (head * dim + first)
                if at_once == 2:
                    _add_values_of_two(of_head, 4 * longest, place, value_step, count, target, 4 * dim, asked, share)
                else:
                    _add_values(of_head, 4 * longest, place, value_step, count, target, 4 * dim, asked, share)
                asked += WIDTH * share


@kernel()
def attend_decode(
    query: HeadRows, cache: KeysValues, out: int, rows: RowTables, sinks: Any, sizes: AttentionSizes, dtype_tag: Any
) -> None:
    """See `paged_attention.attend_decode`."""
    num_heads, value_dim, block_size = sizes.num_heads, sizes.value_dim, sizes.block_size
    group, row_bytes = num_heads // sizes.num_kv_heads, sizes.element_bytes * sizes.num_kv_heads
    key_step, value_step = row_bytes * sizes.key_dim, row_bytes * value_dim
    tables, positions, first_keys, keys, values = rows.tables, rows.positions, rows.first_keys, cache.keys, cache.values
    first_tiles, end_tiles = first_keys // WIDTH, positions // WIDTH + 1
    longest = (end_tiles - first_tiles).max() * WIDTH
    scores, sums = np.empty((num_heads, longest), np.float32), np.empty((num_heads, value_dim), np.float32)
    out_p = pointer(out, dtype_tag)
    key_sizes = num_heads, group, sizes.key_dim, key_step, block_size, longest
    value_sizes = num_heads, group, value_dim, value_step, block_size, longest
    for row in range(len(positions)):
        table, skipped = tables[rows.table_of[row]], first_keys[row] % WIDTH
        count, seen = positions[row] + 1 - first_keys[row], (first_tiles[row], end_tiles[row])
        ahead = values + _place(table, seen[0], block_size) * value_step
        of_row = query.address + 2 * row * query.row_stride
        _score_row(of_row, 2 * query.head_stride, keys, ahead, scores.ctypes.data, seen, table, key_sizes)
        for head in range(num_heads):
            of_head = scores[head, skipped : skipped + count]
            for i in range(count):
                of_head[i] *= np.float32(sizes.scaling)
            softmax(of_head, count, sinks[head : head + 1], sizes.softcap)
        sums[:] = np.float32(0)
        following = min(row + 1, len(positions) - 1)
        ahead = keys + _place(tables[rows.table_of[following]], first_tiles[following], block_size) * key_step
        here = scores.ctypes.data
        _sum_row(here, values, ahead, sums.ctypes.data, seen, skipped, skipped + count, table, value_sizes)
        for head in range(num_heads):
            place = (row * num_heads + head) * value_dim
            for e in range(value_dim):
                out_p[place + e] = round_to(sums[head, e], dtype_tag)
