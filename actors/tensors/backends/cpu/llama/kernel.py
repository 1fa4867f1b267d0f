"""Llama's decoder layer in kernels that call each other: products, what lies between them, and the sums over shards.

T tokens · H hidden size · B rows of one token. `buffers` are addresses: of the hidden states [T, H], of normed ones, of
a product [T, (heads + 2 KV heads) × D], its queries, attention's output, and the gated MLP's two halves and product.
`sizes`: (hidden, between the MLP's products, heads, KV heads, D, block size). bfloat16 only.
"""

from typing import Any

import numpy as np
import torch

from actors.tensors.backends.cpu.compile import kernel
from actors.tensors.backends.cpu.gemm import multiply_rows
from actors.tensors.backends.cpu.kernels import DTYPE_TAGS, rms_norm, rotate_and_store, silu_mul
from actors.tensors.backends.cpu.paged_attention_avx512 import attend_decode
from cluster.collectives.elements import pointer, round_to, to_float32
from cluster.collectives.exchange import OK, SIZE, all_reduce
from cluster.collectives.shared_memory import kind_of_all_reduce

__all__ = ["run"]

DTYPE = torch.bfloat16
_TAG = DTYPE_TAGS[DTYPE]
_KIND = kind_of_all_reduce(DTYPE)
_NO_SINKS = np.zeros(0, np.float32)

PROJECT, ATTEND, FINISH = 1, 2, 4  # parts of a layer

# What a layer's row of the table says: addresses, and which of a step's mask_specs its attention has
NORM, QKV, QKV_BIAS, OUT, MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, NO_BIAS, KEYS, VALUES, SIGHT = range(12)


@kernel()
def _project(layer: Any, buffers: Any, angles: Any, slots: Any, sizes: Any) -> None:
    """Normed rows → queries, and keys and values in the cache."""
    _, normed, product, query, _, _, _ = buffers
    hidden, _, num_heads, num_kv_heads, head_dim, _ = sizes
    num_outputs = (num_heads + 2 * num_kv_heads) * head_dim
    multiply_rows(normed, layer[QKV], layer[QKV_BIAS], product, len(slots), hidden, num_outputs, layer[OUT])
    heads = num_heads, num_kv_heads, head_dim
    rotate_and_store(product, angles[0], angles[1], query, layer[KEYS], layer[VALUES], slots, heads, _TAG)


@kernel()
def _add(x: int, other: int, count: int) -> None:
    x_p, other_p = pointer(x, _TAG), pointer(other, _TAG)
    for i in range(count):
        x_p[i] = round_to(to_float32(x_p[i]) + to_float32(other_p[i]), _TAG)


@kernel()
def _add_reduced(state: Any, part: int, x: int, norm: int, normed: int, num_rows: int, size: int, eps: float) -> Any:
    """Sum the shards' parts [T, H], add that to `x`, and norm it (0: do not) → the status of the exchange.

    A row at a time, so that the norm finds it in the first cache; `normed` may lie where `part` does.
    """
    if state[SIZE] > 1:
        status = all_reduce(state, _KIND, part, num_rows * size, 2, _TAG)
        if status != OK:
            return status
    for row in range(num_rows):
        here = row * 2 * size
        _add(x + here, part + here, size)
        if norm:
            rms_norm(x + here, norm, normed + here, 1, size, size, size, eps, _TAG)
    return OK


@kernel()
def _finish(layers: Any, i: int, attended: int, buffers: Any, num_rows: int, sizes: Any, eps: float, state: Any) -> Any:
    """What follows attention in layer `i`, and the norm before the next one's → the status of its exchanges."""
    x, normed, _, _, _, both, activated = buffers
    hidden, inside, num_heads, _, head_dim, _ = sizes
    layer = layers[i]
    multiply_rows(attended, layer[OUT], layer[NO_BIAS], normed, num_rows, num_heads * head_dim, hidden, layer[GATE_UP])
    status = _add_reduced(state, normed, x, layer[MLP_NORM], normed, num_rows, hidden, eps)
    if status != OK:
        return status
    multiply_rows(normed, layer[GATE_UP], layer[GATE_UP_BIAS], both, num_rows, hidden, 2 * inside, layer[DOWN])
    silu_mul(both, both + 2 * inside, activated, num_rows, inside, 2 * inside, 2 * inside, _TAG)
    is_last = i + 1 == len(layers)
    next_read, next_norm = (layer[DOWN], 0) if is_last else (layers[i + 1, QKV], layers[i + 1, NORM])
    multiply_rows(activated, layer[DOWN], layer[NO_BIAS], normed, num_rows, inside, hidden, next_read)
    return _add_reduced(state, normed, x, next_norm, normed, num_rows, hidden, eps)


@kernel()
def run(
    layers: Any, first: int, end: int, parts: int, buffers: Any, angles: Any, slots: Any, rows: Any, sizes: Any,
    eps: float, scaling: float, state: Any,
) -> Any:  # fmt: skip
    """Some layers, or parts of them → the status of their exchanges.

    `slots` is of the tokens that are projected, `rows` of those that are attended and finished: as the rows of
    `attend_decode`, but the first keys of each mask_spec [mask_specs, B]. Whole layers and parts run the same instructions, so
    that what becomes of a row does not depend, even in its last bit, on what else is attended here.
    """
    query, attended = buffers[3], buffers[4]
    tables, places, positions, first_keys = rows
    _, _, num_heads, num_kv_heads, head_dim, block_size = sizes
    cache, strides = (num_heads, num_kv_heads, head_dim, head_dim, block_size, 2), (num_heads * head_dim, head_dim)
    for i in range(first, end):
        layer = layers[i]
        if parts & PROJECT:
            _project(layer, buffers, angles, slots, sizes)
        if parts & ATTEND:
            addresses = query, layer[KEYS], layer[VALUES], attended
            of_rows = tables, places, positions, first_keys[layer[SIGHT]]
            attend_decode(addresses, of_rows, _NO_SINKS, cache, strides, scaling, 0.0, _TAG)
        if parts & FINISH:
            status = _finish(layers, i, attended, buffers, len(places), sizes, eps, state)
            if status != OK:
                return status
    return OK
