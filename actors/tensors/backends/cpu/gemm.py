"""Products with panel-packed bfloat16 weights by VDPBF16PS (AVX-512), a panel at a time, the next one prefetched.

A weight [N, K] lies in panels of 32 outputs (the last one may have 16): for each pair of inputs, two numbers of each
output. Every output is summed in float32 in the order of its inputs, whatever other rows are computed, and rounded
once. For few rows this is faster than oneDNN, which does not compute while it waits for memory. On CPUs with AMX oneDNN
is faster, and older CPUs do not have the instruction.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from actors.tensors.backends.cpu.avx512 import I32, I64, PAIRS, WIDTH, WORDS, Writer, has_dot_product, has_matrix_tiles
from actors.tensors.backends.cpu.compile import kernel
from cluster.collectives.elements import pointer

_VECTORS = 2  # vectors of outputs in a full panel; a last half panel has one
_PANEL = _VECTORS * WIDTH  # outputs of a full panel
_MOST_ROWS = 12  # rows of the input in registers: 24 sums, 2 weights and an input fill 32 registers
_BYTES_AT_ONCE = 3 << 17  # of the input: its rows, and a panel, stay in the L2 cache of a core
_ALIAS_BYTES, _MOST_ALIASES = 4096, 6  # lines so far apart share a set of the L1 cache, which holds 8 or 12
_LINE_BYTES = 64
_PAIR = np.int32(0)  # dtype tag of two bfloat16


class PackedWeight(NamedTuple):
    """A packed weight [N, K] and its bias [N]: addresses and sizes."""

    panels: int
    bias: int
    num_outputs: int  # N
    num_inputs: int  # K


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
    """Pack a weight [N, K] → the same numbers in panels [N × K]."""
    in_full = weight.shape[0] // _PANEL * _PANEL  # outputs in full panels
    return torch.cat([_panels(weight[:in_full], _VECTORS), _panels(weight[in_full:], 1)])


def unpack(packed: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """The inverse of `pack` → [N, K]."""
    num_inputs = packed.numel() // num_outputs
    in_full = num_outputs // _PANEL * _PANEL
    parts = torch.split(packed, [in_full * num_inputs, (num_outputs - in_full) * num_inputs])
    shapes = [(-1, num_inputs // 2, num_vectors, WIDTH, 2) for num_vectors in (_VECTORS, 1)]
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
    sizes = num_outputs, num_inputs, x.numel() // num_inputs
    _multiply(x.data_ptr(), packed.data_ptr(), bias.data_ptr(), out.data_ptr(), *sizes)
    return out


def _panels(weight: torch.Tensor, num_vectors: int) -> torch.Tensor:
    num_outputs, num_inputs = weight.shape
    panels = weight.reshape(num_outputs // (num_vectors * WIDTH), num_vectors, WIDTH, num_inputs // 2, 2)
    return panels.permute(0, 3, 1, 2, 4).reshape(-1)


def _write_tile(writer: Writer, num_rows: int, num_vectors: int, arguments: Any) -> None:
    """The product of `num_rows` rows and one panel, with all sums in registers. See `_tile_of` for the arguments."""
    x, x_step, panel, num_pairs, bias, out, out_step, ahead, ahead_step = arguments
    grid = [(row, i) for row in range(num_rows) for i in range(num_vectors)]
    rows = [writer.offset(x, x_step, I64(row)) for row in range(num_rows)]
    biases = [writer.load_as_float32(writer.pointer_to(bias, first=2 * WIDTH * i)) for i in range(num_vectors)]

    def add(pair: Any, sums: list[Any]) -> list[Any]:
        prefetched = writer.offset(ahead, ahead_step, pair)
        weights = []
        for i in range(num_vectors):
            weights.append(writer.load_pairs(writer.pointer_to(panel, pair, 64 * num_vectors, 64 * i), align=64))
            writer.prefetch(writer.pointer_to(prefetched, first=64 * i))
        summed: list[Any] = []
        for row in rows:  # one input at a time: there are no registers for more
            number = writer.builder.load(writer.pointer_to(row, pair, 4), typ=I32, align=2)
            inputs = writer.builder.bitcast(writer.broadcast(number, WORDS), PAIRS)
            summed += [writer.add_dot(sums[len(summed) + i], weights[i], inputs) for i in range(num_vectors)]
        return summed

    summed = writer.loop(num_pairs, [biases[i] for _, i in grid], add)
    for (row, i), sum_ in zip(grid, summed, strict=True):
        target = writer.pointer_to(writer.offset(out, out_step, I64(row)), first=2 * WIDTH * i)
        writer.builder.store(writer.to_bfloat16(sum_), target, align=2)


def _tile_of(num_vectors: int) -> Any:
    """Make the function that multiplies rows by a panel of `num_vectors` vectors."""

    @intrinsic
    def tile(
        typing_context: Any, num_rows: Any, x: Any, x_step: Any, panel: Any, num_pairs: Any, bias: Any, out: Any,
        out_step: Any, ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        """Multiply 1 to _MOST_ROWS rows of the input by one panel; addresses, and steps in bytes.

        With each pair of inputs it prefetches the lines at `ahead`, which advances by `ahead_step` from pair to pair.
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


_full_tile, _half_tile = _tile_of(_VECTORS), _tile_of(1)


@kernel()
def multiply_rows(x: int, weight: PackedWeight, out: int, num_rows: int, next_read: int) -> None:
    """Rows `x` [num_rows, K] by all panels → `out` [num_rows, N]; both contiguous bfloat16, by address.

    `next_read`: the address that the caller reads next, which is prefetched with the last panel.
    """
    x_step, out_step = 2 * weight.num_inputs, 2 * weight.num_outputs
    rows_at_once = max(_MOST_ROWS, _BYTES_AT_ONCE // x_step // _MOST_ROWS * _MOST_ROWS)
    collide = x_step % _ALIAS_BYTES == 0 and num_rows > _MOST_ALIASES
    step = x_step + _LINE_BYTES if collide else x_step
    padded = np.empty(min(rows_at_once, num_rows) * step if collide else 0, np.uint8)
    first = 0
    while first < num_rows:
        count = min(rows_at_once, num_rows - first)
        x_here, out_here = x + first * x_step, out + first * out_step
        if collide:
            _copy_rows(x_here, x_step, padded.ctypes.data, step, count)
            x_here = padded.ctypes.data
        ahead = weight.panels if first + count < num_rows else next_read
        _multiply_cached(x_here, step, weight, out_here, count, ahead)
        first += count


@kernel()
def _multiply(x: int, panels: int, bias: int, out: int, num_outputs: int, num_inputs: int, num_rows: int) -> None:
    """As `multiply_rows`, for a call from Python, which a NamedTuple would make a microsecond slower."""
    multiply_rows(x, PackedWeight(panels, bias, num_outputs, num_inputs), out, num_rows, panels)


@kernel()
def _copy_rows(source: int, step: int, target: int, target_step: int, num_rows: int) -> None:
    """Copy rows of `step` bytes, to rows `target_step` bytes apart.

    This takes a few percent of a product's time; rows that collide in the L1 cache would take a quarter.
    """
    for row in range(num_rows):
        from_p, to_p = pointer(source + row * step, _PAIR), pointer(target + row * target_step, _PAIR)
        for pair in range(step // 4):
            to_p[pair] = from_p[pair]


@kernel()
def _multiply_cached(x: int, x_step: int, weight: PackedWeight, out: int, num_rows: int, next_read: int) -> None:
    """As `multiply_rows`, for rows `x_step` bytes apart that fit into the L2 cache, in groups of nearly equal size."""
    num_outputs, pairs, out_step = weight.num_outputs, weight.num_inputs // 2, 2 * weight.num_outputs
    num_groups = (num_rows + _MOST_ROWS - 1) // _MOST_ROWS
    rows, more = num_rows // num_groups, num_rows % num_groups
    num_full, done = num_outputs // _PANEL, 0
    for number in range(num_full + num_outputs % _PANEL // WIDTH):
        is_full = number < num_full
        outputs = _PANEL if is_full else WIDTH
        panel, panel_bytes = weight.panels + done * 4 * pairs, outputs * 4 * pairs
        bias = weight.bias + 2 * done
        # The groups share the prefetching: each pair of inputs of each group prefetches its part of the next panel.
        step = (outputs * 4 + num_groups - 1) // num_groups
        ahead = panel + panel_bytes if done + outputs < num_outputs else next_read
        x_here, out_here = x, out + 2 * done
        for group in range(num_groups):
            count = rows + 1 if group < more else rows
            prefetched = ahead + group * step * pairs
            if is_full:
                _full_tile(count, x_here, x_step, panel, pairs, bias, out_here, out_step, prefetched, step)
            else:
                _half_tile(count, x_here, x_step, panel, pairs, bias, out_here, out_step, prefetched, step)
            x_here += count * x_step
            out_here += count * out_step
        done += outputs
