"""Products with bfloat16 weights by VDPBF16PS (AVX-512): a panel of the weight at a time, the next one prefetched.

A weight [N, K] lies in panels of 32 outputs (the last one of 16): for each pair of inputs, each output's two numbers.
Every output is summed up in float32 in the order of its inputs, whatever rows are computed beside it, and rounded once.
For few rows this is faster than oneDNN, which waits for the memory and computes in turn. With matrix tiles (AMX) oneDNN
is faster, and elsewhere there is no such instruction.
"""

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from actors.tensors.backends.cpu.avx512 import I32, I64, PAIRS, WIDTH, WORDS, Writer, has_dot_product, has_matrix_tiles
from actors.tensors.backends.cpu.compile import kernel
from cluster.collectives.elements import pointer

_WIDE = 2  # vectors of a panel
_MOST_ROWS = 12  # of the input at a time: 24 sums, 2 weights and an input in 32 registers
_BYTES_AT_ONCE = 3 << 17  # of the input: so many rows, and a panel, stay in a core's second cache
_ALIAS_BYTES, _MOST_ALIASES = 4096, 6  # lines so far apart share a set of the first cache, which holds 8 or 12
_LINE_BYTES = 64
_PAIR = np.int32(0)  # two numbers


def why_not(weight: torch.Tensor) -> str | None:
    """Why a weight [out, in] is not multiplied in panels on this CPU; None: it is."""
    num_outputs, num_inputs = weight.shape
    if not has_dot_product():
        return "this CPU has no VDPBF16PS"
    if has_matrix_tiles():
        return "this CPU has AMX, with which oneDNN is faster"
    if weight.dtype != torch.bfloat16:
        return f"VDPBF16PS multiplies bfloat16, not {str(weight.dtype).removeprefix('torch.')}"
    if num_outputs % WIDTH or num_inputs % 2:
        return f"a weight of {num_outputs} × {num_inputs} does not fill panels of {WIDTH} × 2"
    return None


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] → the same numbers, flat, in panels."""
    num_wide = weight.shape[0] // (_WIDE * WIDTH) * _WIDE * WIDTH
    return torch.cat([_panels(weight[:num_wide], _WIDE), _panels(weight[num_wide:], 1)])


def unpack(packed: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """The inverse of `pack` → [N, K]."""
    num_inputs = packed.numel() // num_outputs
    num_wide = num_outputs // (_WIDE * WIDTH) * _WIDE * WIDTH
    parts = torch.split(packed, [num_wide * num_inputs, (num_outputs - num_wide) * num_inputs])
    shapes = [(-1, num_inputs // 2, num_vectors, WIDTH, 2) for num_vectors in (_WIDE, 1)]
    return torch.cat(
        [
            part.view(shape).permute(0, 2, 3, 1, 4).reshape(-1, num_inputs)
            for part, shape in zip(parts, shapes, strict=True)
        ]
    )


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rows [*, K], contiguous, by a packed weight, plus the bias [N] → [*, N]."""
    num_inputs, num_outputs = x.shape[-1], bias.shape[0]
    out = x.new_empty(*x.shape[:-1], num_outputs)
    addresses = x.data_ptr(), packed.data_ptr(), bias.data_ptr(), out.data_ptr()
    multiply_rows(*addresses, x.numel() // num_inputs, num_inputs, num_outputs, packed.data_ptr())
    return out


def _panels(weight: torch.Tensor, num_vectors: int) -> torch.Tensor:
    num_outputs, num_inputs = weight.shape
    panels = weight.reshape(num_outputs // (num_vectors * WIDTH), num_vectors, WIDTH, num_inputs // 2, 2)
    return panels.permute(0, 3, 1, 2, 4).reshape(-1)


def _write_tile(writer: Writer, num_rows: int, num_vectors: int, arguments: Any) -> None:
    """The product of so many rows with one panel; all sums stay in registers. See `_tiles` for the arguments."""
    x, x_step, panel, num_pairs, bias, out, out_step, ahead, ahead_step = arguments
    grid = [(row, i) for row in range(num_rows) for i in range(num_vectors)]
    rows = [writer.moved(x, x_step, I64(row)) for row in range(num_rows)]
    biases = [writer.load_wide(writer.at(bias, first=2 * WIDTH * i)) for i in range(num_vectors)]

    def add(pair: Any, sums: list[Any]) -> list[Any]:
        asked = writer.moved(ahead, ahead_step, pair)
        weights = []
        for i in range(num_vectors):
            weights.append(writer.load_pairs(writer.at(panel, pair, 64 * num_vectors, 64 * i), align=64))
            writer.ask_for(writer.at(asked, first=64 * i))
        summed: list[Any] = []
        for row in rows:  # one input at a time: there are no registers for more
            number = writer.builder.load(writer.at(row, pair, 4), typ=I32, align=2)
            same = writer.builder.bitcast(writer.everywhere(number, WORDS), PAIRS)
            summed += [writer.add_dot(sums[len(summed) + i], weights[i], same) for i in range(num_vectors)]
        return summed

    summed = writer.loop(num_pairs, [biases[i] for _, i in grid], add)
    for (row, i), sum_ in zip(grid, summed, strict=True):
        target = writer.at(writer.moved(out, out_step, I64(row)), first=2 * WIDTH * i)
        writer.builder.store(writer.rounded(sum_), target, align=2)


def _tiles(num_vectors: int) -> Any:
    """A function for panels of so many registers."""

    @intrinsic
    def tile(
        typing_context: Any, num_rows: Any, x: Any, x_step: Any, panel: Any, num_pairs: Any, bias: Any, out: Any,
        out_step: Any, ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        """1 to _MOST_ROWS rows of the input by one panel; addresses, and steps in bytes.

        With each pair of inputs it asks for the lines at `ahead`, which lie `ahead_step` further for the next pair.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            end = builder.append_basic_block("end")
            choice = builder.switch(arguments[0], end)
            for num_rows in range(1, _MOST_ROWS + 1):
                block = builder.append_basic_block(f"rows{num_rows}")
                choice.add_case(I64(num_rows), block)
                builder.position_at_end(block)
                _write_tile(Writer(builder), num_rows, num_vectors, arguments[1:])
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile


_wide_tile, _slim_tile = _tiles(_WIDE), _tiles(1)


@kernel()
def multiply_rows(
    x: int, packed: int, bias: int, out: int, num_rows: int, num_inputs: int, num_outputs: int, following: int
) -> None:
    """Rows [num_rows, K] by all panels → [num_rows, N]; bfloat16, by addresses. `following`: what is read next."""
    rows_at_once = max(_MOST_ROWS, _BYTES_AT_ONCE // (2 * num_inputs) // _MOST_ROWS * _MOST_ROWS)
    x_step = 2 * num_inputs
    collide = x_step % _ALIAS_BYTES == 0 and num_rows > _MOST_ALIASES
    step = x_step + _LINE_BYTES if collide else x_step
    apart = np.empty(min(rows_at_once, num_rows) * step if collide else 0, np.uint8)
    first = 0
    while first < num_rows:
        count = min(rows_at_once, num_rows - first)
        x_here, out_here = x + first * x_step, out + first * 2 * num_outputs
        if collide:
            _copy_rows(x_here, x_step, apart.ctypes.data, step, count)
            x_here = apart.ctypes.data
        next_read = packed if first + count < num_rows else following
        _multiply_some(x_here, step, packed, bias, out_here, count, num_inputs, num_outputs, next_read)
        first += count


@kernel()
def _copy_rows(source: int, step: int, target: int, target_step: int, num_rows: int) -> None:
    """Rows of `step` bytes, put `target_step` apart. It takes some hundredths of a product, collisions a quarter."""
    for row in range(num_rows):
        from_p, to_p = pointer(source + row * step, _PAIR), pointer(target + row * target_step, _PAIR)
        for pair in range(step // 4):
            to_p[pair] = from_p[pair]


@kernel()
def _multiply_some(
    x: int, x_step: int, packed: int, bias: int, out: int, num_rows: int, num_inputs: int, num_outputs: int,
    following: int,
) -> None:  # fmt: skip
    """The same for rows that stay in the cache while the panels go by, divided evenly into groups."""
    pairs, out_step = num_inputs // 2, 2 * num_outputs
    num_groups = (num_rows + _MOST_ROWS - 1) // _MOST_ROWS
    rows, more = num_rows // num_groups, num_rows % num_groups
    num_wide, done = num_outputs // (_WIDE * WIDTH), 0
    for number in range(num_wide + num_outputs % (_WIDE * WIDTH) // WIDTH):
        is_wide = number < num_wide
        outputs = _WIDE * WIDTH if is_wide else WIDTH
        panel, panel_bytes = packed + done * 2 * num_inputs, outputs * 2 * num_inputs
        # The groups share the asking: each pair of each of them asks for its part of the next panel.
        step = (outputs * 4 + num_groups - 1) // num_groups
        ahead = panel + panel_bytes if done + outputs < num_outputs else following
        x_here, out_here = x, out + 2 * done
        for group in range(num_groups):
            count = rows + 1 if group < more else rows
            asked = ahead + group * step * pairs
            if is_wide:
                _wide_tile(count, x_here, x_step, panel, pairs, bias + 2 * done, out_here, out_step, asked, step)
            else:
                _slim_tile(count, x_here, x_step, panel, pairs, bias + 2 * done, out_here, out_step, asked, step)
            x_here += count * x_step
            out_here += count * out_step
        done += outputs
