"""Paged attention in Triton: online softmax over the blocks of the cache, for decode rows and for chunks of prompts.

T tokens of the step · S sequences, O = S + 1 offsets · W pieces of work · h query heads · H KV heads · D dimension of a
key · E of a value · R rows of a query tile, each a token and a head · K keys of a key tile · N splits of a sequence.
SHAPE is an AttentionShape, STRIDES are CacheStrides. Sums are in float32. Logits are times log2(e), so that exp2 gives
the weights.

What is computed for a token depends on its sequence alone, to the bit: splits and key tiles begin at fixed multiples of
keys, and are added in a fixed order, whatever else is in the step.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_SEQS = tl.constexpr(128)  # sequences that `plan_work` counts at once
_MERGED = tl.constexpr(8)  # splits that `merge_splits` adds at once
IS_INTERPRETED = triton.knobs.runtime.interpret  # by NumPy on the CPU, where Triton's TRITON_INTERPRET says so


@triton.jit
def _first_key(position: tl.tensor, SHAPE: tl.constexpr) -> tl.tensor:
    """The first key that a token sees, as MaskSpec.first_key; a window or chunk of 0 is none."""
    first = position * 0
    if SHAPE.window:
        first = tl.maximum(position - (SHAPE.window - 1), first)
    if SHAPE.chunk:
        first = tl.maximum(position // SHAPE.chunk * SHAPE.chunk, first)
    return first


@triton.jit
def _keys_per_split(position: tl.tensor, SHAPE: tl.constexpr) -> tl.tensor:
    """Keys of each split of a token's keys, and the multiple of `segment` where the first one begins."""
    first_segment = _first_key(position, SHAPE) // SHAPE.segment
    num_segments = position // SHAPE.segment - first_segment + 1
    return tl.cdiv(num_segments, SHAPE.max_splits) * SHAPE.segment, first_segment * SHAPE.segment


@triton.jit
def _num_pieces(
    lengths: tl.tensor, first_tokens: tl.tensor, seq: tl.tensor, is_seq: tl.tensor, SHAPE: tl.constexpr
) -> tl.tensor:
    """Pieces of work of sequences: splits of those with one token in the step, or query tiles of those with more."""
    length = tl.load(lengths + seq, mask=is_seq, other=1)
    end = tl.load(first_tokens + seq + 1, mask=is_seq, other=0)
    num_tokens = end - tl.load(first_tokens + seq, mask=is_seq, other=0)
    if SHAPE.max_splits:
        size, begin = _keys_per_split(length - 1, SHAPE)
        num_pieces = tl.where(num_tokens == 1, tl.cdiv(length - begin, size), 0)
    else:
        num_pieces = tl.where(num_tokens > 1, tl.cdiv(num_tokens, SHAPE.tokens), 0)
    return num_pieces


@triton.jit
def plan_work(
    lengths: tl.tensor, first_tokens: tl.tensor, pieces: tl.tensor, offsets: tl.tensor, SHAPE: tl.constexpr
) -> None:
    """One program a sequence: its pieces [W, 2], each (sequence, index in it), and where they end, offsets [O].

    lengths [S], first_tokens [O]; all int32.
    """
    own, n = tl.program_id(0), tl.arange(0, _SEQS)
    begin = own * 0
    for first in range(0, own, _SEQS):
        is_before = first + n < own
        begin += tl.sum(tl.where(is_before, _num_pieces(lengths, first_tokens, first + n, is_before, SHAPE), 0), 0)
    num_pieces = _num_pieces(lengths, first_tokens, own, own >= 0, SHAPE)
    tl.store(offsets, 0, mask=own == 0)
    tl.store(offsets + own + 1, begin + num_pieces)
    for first in range(0, num_pieces, _SEQS):
        is_piece = first + n < num_pieces
        tl.store(pieces + 2 * (begin + first + n), own, mask=is_piece)
        tl.store(pieces + 2 * (begin + first + n) + 1, first + n, mask=is_piece)


@triton.jit
def _load_rows(
    base: tl.tensor, at: tl.tensor, is_row: tl.tensor, FIRST: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr
) -> tl.tensor:
    """Columns [FIRST, FIRST + SIZE) of rows of DIM columns → [rows, SIZE], zeros where there is none."""
    column = FIRST + tl.arange(0, SIZE)
    return tl.load(base + at[:, None] + column[None, :], mask=is_row[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _load_transposed(
    base: tl.tensor, at: tl.tensor, is_row: tl.tensor, FIRST: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr
) -> tl.tensor:
    """The same → [SIZE, rows]."""
    column = FIRST + tl.arange(0, SIZE)
    return tl.load(base + at[None, :] + column[:, None], mask=is_row[None, :] & (column < DIM)[:, None], other=0.0)


@triton.jit
def _cap(logits: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Softcap × tanh(logits / softcap), finite for all logits."""
    x = logits / softcap
    e = tl.exp2(tl.abs(x) * _LOG2E * -2.0)
    return softcap * tl.where(x >= 0, 1.0, -1.0) * ((1.0 - e) / (1.0 + e))


@triton.jit
def _attend(
    query: tl.tensor, at_R: tl.tensor, is_row: tl.tensor, position_R: tl.tensor, keys: tl.tensor, values: tl.tensor,
    table: tl.tensor, kv_head: tl.tensor, begin: tl.tensor, end: tl.tensor, first: tl.tensor, scaling: tl.tensor,
    softcap: tl.tensor, SHAPE: tl.constexpr, STRIDES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows over keys [begin, end) of a sequence → highest logit [R], sum of weights [R], weighted values [R, E].

    `begin` is a multiple of K. Keys before `first` are not read. A tile of which a row sees no key changes none of the
    row's bits.
    """
    query_RD = _load_rows(query, at_R, is_row, 0, SHAPE.key_main, SHAPE.key_dim)
    if SHAPE.key_rest:
        rest_RD = _load_rows(query, at_R, is_row, SHAPE.key_main, SHAPE.key_rest, SHAPE.key_dim)
    highest_R = tl.full([SHAPE.rows], float("-inf"), tl.float32)
    total_R = tl.full([SHAPE.rows], 0.0, tl.float32)
    sum_RE = tl.full([SHAPE.rows, SHAPE.value_padded], 0.0, tl.float32)
    for start in range(begin, end, SHAPE.keys):
        key_K = start + tl.arange(0, SHAPE.keys)
        is_key = (key_K >= first) & (key_K < end)  # other slots may hold NaN, and 0 × NaN is NaN
        block_K = tl.load(table + key_K // SHAPE.block_size, mask=is_key, other=0).to(tl.int64)
        slot_K = key_K % SHAPE.block_size
        at_K = block_K * STRIDES.key_block + slot_K * STRIDES.key_slot + kv_head * STRIDES.key_head
        key_DK = _load_transposed(keys, at_K, is_key, 0, SHAPE.key_main, SHAPE.key_dim)
        logits_RK = tl.dot(query_RD, key_DK, input_precision="ieee")
        if SHAPE.key_rest:
            key_DK = _load_transposed(keys, at_K, is_key, SHAPE.key_main, SHAPE.key_rest, SHAPE.key_dim)
            logits_RK = tl.dot(rest_RD, key_DK, acc=logits_RK, input_precision="ieee")
        logits_RK = logits_RK * scaling
        if SHAPE.has_cap:
            logits_RK = _cap(logits_RK, softcap)
        is_seen = (key_K[None, :] <= position_R[:, None]) & (key_K[None, :] >= _first_key(position_R, SHAPE)[:, None])
        logits_RK = tl.where(is_seen, logits_RK * _LOG2E, float("-inf"))
        new_R = tl.maximum(highest_R, tl.max(logits_RK, 1))
        finite_R = tl.where(new_R == float("-inf"), 0.0, new_R)  # a row that has seen no key yet
        weight_RK = tl.exp2(logits_RK - finite_R[:, None])
        kept_R = tl.exp2(highest_R - finite_R)
        total_R = total_R * kept_R + tl.sum(weight_RK, 1)
        at_K = block_K * STRIDES.value_block + slot_K * STRIDES.value_slot + kv_head * STRIDES.value_head
        value_KE = _load_rows(values, at_K, is_key, 0, SHAPE.value_padded, SHAPE.value_dim)
        sum_RE = tl.dot(weight_RK.to(value_KE.dtype), value_KE, acc=sum_RE * kept_R[:, None], input_precision="ieee")
        highest_R = new_R
    return highest_R, total_R, sum_RE


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def attend_splits(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, tables: tl.tensor, lengths: tl.tensor,
    first_tokens: tl.tensor, pieces: tl.tensor, offsets: tl.tensor, sums: tl.tensor, highest: tl.tensor,
    totals: tl.tensor, scaling: tl.tensor, softcap: tl.tensor, num_seqs: tl.tensor, table_stride: tl.tensor,
    token_stride: tl.tensor, head_stride: tl.tensor, SHAPE: tl.constexpr, STRIDES: tl.constexpr,
) -> None:  # fmt: skip
    """Attend with the single token of a sequence to one split of its keys; a program takes every so-manieth piece.

    Query by token and head with D; sums [W × h, E], highest and totals [W × h], float32.
    """
    row = tl.arange(0, SHAPE.rows)
    num_parts = SHAPE.num_kv_heads * SHAPE.parts
    for index in range(tl.program_id(0), tl.load(offsets + num_seqs) * num_parts, tl.num_programs(0)):
        piece, part = index // num_parts, index % num_parts
        seq, split = tl.load(pieces + 2 * piece), tl.load(pieces + 2 * piece + 1)
        kv_head, head_R = part // SHAPE.parts, part % SHAPE.parts * SHAPE.heads + row
        is_row = (row < SHAPE.heads) & (head_R < SHAPE.group)
        head_R += kv_head * SHAPE.group
        position = tl.load(lengths + seq) - 1
        size, begin = _keys_per_split(position, SHAPE)
        begin += split * size
        end, first = tl.minimum(begin + size, position + 1), _first_key(position, SHAPE)
        begin = tl.maximum(begin, first // SHAPE.keys * SHAPE.keys)
        token = tl.load(first_tokens + seq).to(tl.int64)
        highest_R, total_R, sum_RE = _attend(
            query, token * token_stride + head_R * head_stride, is_row, tl.where(is_row, position, -1), keys, values,
            tables + seq * table_stride, kv_head, begin, end, first, scaling, softcap, SHAPE,
            STRIDES,
        )  # fmt: skip
        out_R = piece.to(tl.int64) * (SHAPE.num_kv_heads * SHAPE.group) + head_R
        tl.store(highest + out_R, highest_R, mask=is_row)
        tl.store(totals + out_R, total_R, mask=is_row)
        e = tl.arange(0, SHAPE.value_padded)
        at_RE = out_R[:, None] * SHAPE.value_dim + e[None, :]
        tl.store(sums + at_RE, sum_RE, mask=is_row[:, None] & (e < SHAPE.value_dim)[None, :])


@triton.jit
def merge_splits(
    sums: tl.tensor,
    highest: tl.tensor,
    totals: tl.tensor,
    sinks: tl.tensor,
    first_tokens: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    SHAPE: tl.constexpr,
) -> None:
    """Add a sequence's splits; one program for each sequence and head. sinks [h]; out [T, h, E]."""
    seq, head = tl.program_id(0), tl.program_id(1)
    num_heads = SHAPE.num_kv_heads * SHAPE.group
    begin = tl.load(offsets + seq)
    num_splits = tl.load(offsets + seq + 1) - begin
    if num_splits > 0:
        first = begin.to(tl.int64) * num_heads + head
        n, e = tl.arange(0, SHAPE.max_splits), tl.arange(0, SHAPE.value_padded)
        highest_N = tl.load(highest + first + n * num_heads, mask=n < num_splits, other=float("-inf"))
        total_N = tl.load(totals + first + n * num_heads, mask=n < num_splits, other=0.0)
        top = tl.max(highest_N, 0)
        if SHAPE.has_sinks:
            sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
            top = tl.maximum(top, sink)
        total = tl.sum(total_N * tl.exp2(highest_N - top), 0)
        if SHAPE.has_sinks:
            total += tl.exp2(sink - top)
        sum_E = tl.full([SHAPE.value_padded], 0.0, tl.float32)
        for start in range(0, num_splits, _MERGED):
            m = start + tl.arange(0, _MERGED)
            at_M = first + m * num_heads
            weight_M = tl.exp2(tl.load(highest + at_M, mask=m < num_splits, other=float("-inf")) - top)
            sum_ME = _load_rows(sums, at_M * SHAPE.value_dim, m < num_splits, 0, SHAPE.value_padded, SHAPE.value_dim)
            sum_E += tl.sum(sum_ME * weight_M[:, None], 0)
        token = tl.load(first_tokens + seq).to(tl.int64)
        at_E = (token * num_heads + head) * SHAPE.value_dim + e
        tl.store(out + at_E, (sum_E / total).to(out.dtype.element_ty), mask=e < SHAPE.value_dim)


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def attend_chunks(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, tables: tl.tensor, lengths: tl.tensor,
    first_tokens: tl.tensor, pieces: tl.tensor, offsets: tl.tensor, sinks: tl.tensor, out: tl.tensor,
    scaling: tl.tensor, softcap: tl.tensor, num_seqs: tl.tensor, table_stride: tl.tensor, token_stride: tl.tensor,
    head_stride: tl.tensor, SHAPE: tl.constexpr, STRIDES: tl.constexpr,
) -> None:  # fmt: skip
    """Attend with a tile of a sequence's tokens to all of its keys; one program for each piece and heads of a tile.

    Query by token and head with D; sinks [h]; out [T, h, E].
    """
    piece, part = tl.program_id(0), tl.program_id(1)
    if piece < tl.load(offsets + num_seqs):
        seq, tile = tl.load(pieces + 2 * piece), tl.load(pieces + 2 * piece + 1)
        row = tl.arange(0, SHAPE.rows)
        kv_head, head_R = part // SHAPE.parts, part % SHAPE.parts * SHAPE.heads + row % SHAPE.heads
        first_token, length = tl.load(first_tokens + seq), tl.load(lengths + seq)
        num_tokens = tl.load(first_tokens + seq + 1) - first_token
        index_R = tile * SHAPE.tokens + row // SHAPE.heads
        is_row = (row < SHAPE.tokens * SHAPE.heads) & (index_R < num_tokens) & (head_R < SHAPE.group)
        head_R += kv_head * SHAPE.group
        start = length - num_tokens  # position of the chunk's first token
        first = _first_key(start + tile * SHAPE.tokens, SHAPE)
        end = tl.minimum(start + (tile + 1) * SHAPE.tokens, length)
        token_R = (first_token + index_R).to(tl.int64)
        highest_R, total_R, sum_RE = _attend(
            query, token_R * token_stride + head_R * head_stride, is_row, tl.where(is_row, start + index_R, -1), keys,
            values, tables + seq * table_stride, kv_head, first // SHAPE.keys * SHAPE.keys, end, first, scaling,
            softcap, SHAPE, STRIDES,
        )  # fmt: skip
        if SHAPE.has_sinks:
            sink_R = tl.load(sinks + head_R, mask=is_row, other=0.0).to(tl.float32) * _LOG2E
            top_R = tl.maximum(highest_R, sink_R)
            kept_R = tl.exp2(highest_R - top_R)
            total_R = total_R * kept_R + tl.exp2(sink_R - top_R)
            sum_RE = sum_RE * kept_R[:, None]
        out_R = token_R * (SHAPE.num_kv_heads * SHAPE.group) + head_R
        e = tl.arange(0, SHAPE.value_padded)
        sum_RE = (sum_RE / total_R[:, None]).to(out.dtype.element_ty)
        at_RE = out_R[:, None] * SHAPE.value_dim + e[None, :]
        tl.store(out + at_RE, sum_RE, mask=is_row[:, None] & (e < SHAPE.value_dim)[None, :])
