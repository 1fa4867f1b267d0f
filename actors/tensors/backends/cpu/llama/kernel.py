"""Decoder layers of Llama's form as kernels that call each other: products, norms, attention, sums over the shards.

T tokens · H hidden size · B rows of one token · D dimension of a head. bfloat16 only.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from actors.tensors.attention.metadata import Indices
from actors.tensors.backends.cpu.compile import kernel
from actors.tensors.backends.cpu.gemm import PackedWeight, multiply_rows
from actors.tensors.backends.cpu.kernels import (
    DTYPE_TAGS,
    CosSin,
    HeadRows,
    Heads,
    KeysValues,
    Rows,
    rms_norm,
    rotate_and_store,
    silu_mul,
)
from actors.tensors.backends.cpu.paged_attention import AttentionSizes, RowTables
from actors.tensors.backends.cpu.paged_attention_avx512 import attend_rows
from cluster.collectives.elements import pointer, round_to, to_float32
from cluster.collectives.exchange import OK, SIZE, all_reduce
from cluster.collectives.shared_memory import kind_of_all_reduce

__all__ = ["run"]

DTYPE = torch.bfloat16
_TAG = DTYPE_TAGS[DTYPE]
_KIND = kind_of_all_reduce(DTYPE)
_NO_SINKS = np.zeros(0, np.float32)

PROJECT, ATTEND, FINISH = 1, 2, 4  # parts of a layer

# Columns of the table of layers: addresses, and the index of the layer's mask among those of the step
NORM, QKV, QKV_BIAS, OUT, MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, NO_BIAS, KEYS, VALUES, MASK = range(12)


class Buffers(NamedTuple):
    """Addresses of the activations between the products."""

    hidden: int  # [T, H]
    normed: int  # [T, H]; later the output of a product before it is summed over the shards
    product: int  # [T, (heads + 2 KV heads) × D]
    query: int  # [T, heads, D], rotated
    attended: int  # [T, heads, D]
    gate_up: int  # [T, 2 × inner]
    activated: int  # [T, inner]


class Sizes(NamedTuple):
    """What all layers of a run have in common, on this shard."""

    hidden: int
    inner: int  # size between the MLP's products
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    eps: float  # of the norms
    scaling: float  # of the scores


class Part(NamedTuple):
    """The layers [first, end) to run, and which parts of each."""

    first: int
    end: int
    what: int  # PROJECT, ATTEND and FINISH, combined by |


class StepArrays(NamedTuple):
    """The arrays of one step."""

    buffers: Buffers
    angles: CosSin
    slots: Indices  # [T], the slot of each token's key and value in the cache


class RowsByMask(NamedTuple):
    """The rows that are attended and finished: as RowTables, but with the first keys of each mask."""

    tables: Indices
    table_of: Indices
    positions: Indices
    first_keys: Indices  # [masks, B]


@kernel()
def _project(layer: Any, step: StepArrays, sizes: Sizes) -> None:
    """Normed rows → rotated queries, and keys and values in the cache."""
    buffers, num_heads, num_kv_heads, head_dim = step.buffers, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    num_outputs, num_tokens = (num_heads + 2 * num_kv_heads) * head_dim, len(step.slots)
    qkv = PackedWeight(layer[QKV], layer[QKV_BIAS], num_outputs, sizes.hidden)
    multiply_rows(buffers.normed, qkv, buffers.product, num_tokens, layer[OUT])
    cache, heads = KeysValues(layer[KEYS], layer[VALUES]), Heads(num_heads, num_kv_heads, head_dim)
    rotate_and_store(buffers.product, step.angles, buffers.query, cache, step.slots, heads, _TAG)


@kernel()
def _attend(layer: Any, buffers: Buffers, rows: RowsByMask, sizes: Sizes) -> None:
    """Queries → outputs of attention."""
    head_dim, row_stride = sizes.head_dim, sizes.num_heads * sizes.head_dim
    attention = AttentionSizes(
        sizes.num_heads, sizes.num_kv_heads, head_dim, head_dim, sizes.block_size, 2, sizes.scaling, 0.0
    )
    tables = RowTables(rows.tables, rows.table_of, rows.positions, rows.first_keys[layer[MASK]])
    cache = KeysValues(layer[KEYS], layer[VALUES])
    query = HeadRows(buffers.query, row_stride, head_dim)
    attend_rows(query, cache, buffers.attended, tables, _NO_SINKS, attention, _TAG)


@kernel()
def _add(x: int, other: int, count: int) -> None:
    """Add `other` to `x`, `count` numbers each."""
    x_p, other_p = pointer(x, _TAG), pointer(other, _TAG)
    for i in range(count):
        x_p[i] = round_to(to_float32(x_p[i]) + to_float32(other_p[i]), _TAG)


@kernel()
def _add_reduced(state: Any, part: int, x: int, norm: int, normed: int, num_rows: int, size: int, eps: float) -> Any:
    """Sum the shards' parts [T, H], add the sum to `x`, and write its norm to `normed` → the status of the exchange.

    `norm`: the norm's weight, or 0 for none. It goes row by row, so that the norm finds a row in the L1 cache; `normed`
    may be the same memory as `part`.
    """
    if state[SIZE] > 1:
        status = all_reduce(state, _KIND, part, num_rows * size, 2, _TAG)
        if status != OK:
            return status
    for row in range(num_rows):
        here = row * 2 * size
        _add(x + here, part + here, size)
        if norm:
            rms_norm(Rows(x + here, size), norm, Rows(normed + here, size), 1, size, eps, True, _TAG)
    return OK


@kernel()
def _finish(layers: Any, i: int, buffers: Buffers, num_rows: int, sizes: Sizes, state: Any) -> Any:
    """The rest of layer `i` after attention, and the next layer's first norm → the status of the exchanges."""
    layer, normed, hidden, inner, eps = layers[i], buffers.normed, sizes.hidden, sizes.inner, sizes.eps
    out = PackedWeight(layer[OUT], layer[NO_BIAS], hidden, sizes.num_heads * sizes.head_dim)
    gate_up = PackedWeight(layer[GATE_UP], layer[GATE_UP_BIAS], 2 * inner, hidden)
    down = PackedWeight(layer[DOWN], layer[NO_BIAS], hidden, inner)
    multiply_rows(buffers.attended, out, normed, num_rows, gate_up.panels)
    status = _add_reduced(state, normed, buffers.hidden, layer[MLP_NORM], normed, num_rows, hidden, eps)
    if status != OK:
        return status
    both, activated = buffers.gate_up, buffers.activated
    multiply_rows(normed, gate_up, both, num_rows, down.panels)
    silu_mul(Rows(both, 2 * inner), Rows(both + 2 * inner, 2 * inner), activated, num_rows, inner, _TAG)
    is_last = i + 1 == len(layers)
    next_read, next_norm = (layer[DOWN], 0) if is_last else (layers[i + 1, QKV], layers[i + 1, NORM])
    multiply_rows(activated, down, normed, num_rows, next_read)
    return _add_reduced(state, normed, buffers.hidden, next_norm, normed, num_rows, hidden, eps)


@kernel()
def run(layers: Any, part: Part, step: StepArrays, rows: RowsByMask, sizes: Sizes, state: Any) -> Any:
    """Run some layers, or parts of them → the status of their exchanges.

    `step.slots` has the tokens of PROJECT, `rows` those of ATTEND and FINISH. Whole layers and parts run the same
    instructions, so that no bit of a row depends on whether its step is run as a whole or in parts.
    """
    for i in range(part.first, part.end):
        layer = layers[i]
        if part.what & PROJECT:
            _project(layer, step, sizes)
        if part.what & ATTEND:
            _attend(layer, step.buffers, rows, sizes)
        if part.what & FINISH:
            status = _finish(layers, i, step.buffers, len(rows.positions), sizes, state)
            if status != OK:
                return status
    return OK
