"""Launches the Triton kernels of paged attention: their shapes and tile sizes, a step's pieces of work, scratch memory.

T tokens of the step · S sequences, O = S + 1 offsets · W pieces of work · h query heads · D dimension of a key · E of a
value.
"""

from typing import NamedTuple

import torch

from actors.decisions.model.memory import SPLIT_KEYS, max_splits
from actors.decisions.model.spec import AttentionSpec
from actors.tensors.attention.metadata import LayerCache, PagedRows
from actors.tensors.backends.cuda import attention_kernels as kernels

_KEY_TILE_BYTES = 32 << 10  # keys and values of a key tile
_SUMS = 16384  # weighted values of a query tile, in the registers of 8 warps; half as many for 4 warps
_PROGRAMS_PER_UNIT = {64: 4, 128: 3, 256: 2, 512: 1}  # that registers have room for, by the columns of a value tile


class Processor(NamedTuple):
    """What launches depend on: a CUDA device, or what the interpreter stands for."""

    num_units: int  # streaming multiprocessors
    has_warp_groups: bool  # products of four warps together, whose operands stay in shared memory: Hopper

    @classmethod
    def of(cls, device: torch.device) -> "Processor":
        """That of a device."""
        if device.type != "cuda":
            return cls(num_units=2, has_warp_groups=True)
        found = torch.cuda.get_device_properties(device)
        return cls(found.multi_processor_count, found.major == 9)


class AttentionShape(NamedTuple):
    """What a kernel is compiled for, beside the strides of the cache."""

    num_kv_heads: int
    group: int  # query heads to a KV head
    key_dim: int
    key_main: int  # columns of a key in a first product, a power of two
    key_rest: int  # those in a second one, padded to a power of two; 0: none
    value_dim: int
    value_padded: int  # to a power of two
    block_size: int
    window: int  # 0: none
    chunk: int  # 0: none
    has_cap: bool
    has_sinks: bool
    rows: int  # of a query tile: tokens × heads, padded to a power of two
    tokens: int  # of a query tile
    heads: int  # of a query tile
    parts: int  # query tiles that hold the heads of a KV head
    keys: int  # of a key tile
    segment: int
    max_splits: int  # of a token's keys, a power of two; 0: they are not split


class CacheStrides(NamedTuple):
    """Strides of the cache, in elements."""

    key_block: int
    key_slot: int
    key_head: int
    value_block: int
    value_slot: int
    value_head: int

    @classmethod
    def of(cls, cache: LayerCache) -> "CacheStrides":
        """Those of an attention's part of the cache."""
        keys, values = cache.keys_NbHD.stride(), cache.values_NbHD.stride()
        assert keys[3] == values[3] == 1, "the elements of a key, and those of a value, are neighbors"
        return cls(*keys[:3], *values[:3])


class Launch(NamedTuple):
    """How a kernel is compiled and launched."""

    shape: AttentionShape
    num_warps: int
    num_stages: int  # of the pipeline that loads block numbers, keys and values ahead
    programs_per_unit: int  # that registers have room for


class Pieces(NamedTuple):
    """Pieces of work, and where each sequence's begin; see kernels.plan_work."""

    pieces_W2: torch.Tensor  # int32
    offsets_O: torch.Tensor  # int32


class Work(NamedTuple):
    """The pieces of a step for one kind of attention. None: the step has no such sequences."""

    splits: Pieces | None  # of sequences with one token in the step
    tiles: Pieces | None  # of those with more


def launch_of(spec: AttentionSpec, element_bytes: int, block_size: int, processor: Processor, split: bool) -> Launch:
    """How an attention is launched: with `split` for single tokens, else for chunks of prompts."""
    group = spec.num_heads // spec.num_kv_heads
    key_main = max(16, _floor(spec.key_dim))
    key_rest = max(16, _ceiling(spec.key_dim - key_main)) if spec.key_dim > key_main else 0
    value_padded = max(16, _ceiling(spec.value_dim))
    key_bytes = (key_main + key_rest + value_padded) * element_bytes
    # Without tensor cores, as float32 is multiplied, and without warp groups, a product takes more registers
    most_keys = 64 if element_bytes == 2 and (split or processor.has_warp_groups) else 32
    keys = _floor(min(most_keys, max(16, _KEY_TILE_BYTES // key_bytes)))
    most_rows = max(16, min(64 if split else 128, _SUMS // value_padded) // (element_bytes // 2) ** 2)
    heads = min(group, most_rows)
    tokens = 1 if split else most_rows // heads
    rows = max(16, _ceiling(tokens * heads))
    shape = AttentionShape(
        num_kv_heads=spec.num_kv_heads,
        group=group,
        key_dim=spec.key_dim,
        key_main=key_main,
        key_rest=key_rest,
        value_dim=spec.value_dim,
        value_padded=value_padded,
        block_size=block_size,
        window=spec.mask_spec.window or 0,
        chunk=spec.mask_spec.chunk or 0,
        has_cap=spec.softcap is not None,
        has_sinks=spec.has_sinks,
        rows=rows,
        tokens=tokens,
        heads=heads,
        parts=-(-group // heads),
        keys=keys,
        segment=SPLIT_KEYS,
        max_splits=max_splits(spec.num_heads) if split else 0,
    )
    num_warps = 8 if rows > 64 or rows * value_padded > _SUMS // 2 else 4
    return Launch(shape, num_warps, num_stages=3, programs_per_unit=_PROGRAMS_PER_UNIT.get(max(64, value_padded), 1))


def _floor(number: int) -> int:
    """The largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def _ceiling(number: int) -> int:
    """The smallest power of two from a number on."""
    return 1 << (number - 1).bit_length()


class PagedAttention:
    """Computes the attentions that differ in nothing but their parts of the cache."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        self._softcap = spec.softcap or 1.0
        processor = Processor.of(device)
        self._split, self._chunk = (
            launch_of(spec, dtype.itemsize, block_size, processor, split) for split in (True, False)
        )
        self._num_programs = processor.num_units * self._split.programs_per_unit

    def plan(self, rows: PagedRows) -> Work:
        """List the pieces of a step's work on the device; the host's numbers are only upper bounds."""
        splits = tiles = None
        if rows.max_single:
            most_splits = min(self._split.shape.max_splits, -(-rows.max_keys // SPLIT_KEYS))
            splits = _plan(rows, self._split.shape, rows.max_single * most_splits)
        if rows.max_queries > 1:
            most_tiles = rows.max_tokens // self._chunk.shape.tokens + len(rows.lengths_S)
            tiles = _plan(rows, self._chunk.shape, most_tiles)
        return Work(splits, tiles)

    def attend(
        self,
        cache: LayerCache,
        query_hTD: torch.Tensor,
        rows: PagedRows,
        work: Work,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [h, T, D] over the cache, which holds the step's own keys already → [T, h, E]."""
        if query_hTD.stride(2) != 1:
            query_hTD = query_hTD.contiguous()
        out_ThE = query_hTD.new_empty(query_hTD.shape[1], query_hTD.shape[0], cache.values_NbHD.shape[3])
        if work.splits is not None:
            self._attend_splits(cache, query_hTD, rows, work.splits, scaling, sinks, out_ThE)
        if work.tiles is not None:
            self._attend_chunks(cache, query_hTD, rows, work.tiles, scaling, sinks, out_ThE)
        return out_ThE

    def _attend_splits(
        self,
        cache: LayerCache,
        query_hTD: torch.Tensor,
        rows: PagedRows,
        pieces: Pieces,
        scaling: float,
        sinks: torch.Tensor | None,
        out_ThE: torch.Tensor,
    ) -> None:
        """The sequences with one token in the step, their keys in splits."""
        shape = self._split.shape
        num_pieces, num_parts = len(pieces.pieces_W2), shape.num_kv_heads * shape.parts
        sums_WhE = out_ThE.new_empty(num_pieces, *out_ThE.shape[1:], dtype=torch.float32)
        highest_Wh, totals_Wh = sums_WhE.new_empty(2, *sums_WhE.shape[:2])
        num_programs = min(num_pieces * num_parts, self._num_programs)
        kernels.attend_splits[(num_programs,)](
            query_hTD, cache.keys_NbHD, cache.values_NbHD, rows.tables_SN, rows.lengths_S, rows.first_tokens_O, *pieces,
            sums_WhE, highest_Wh, totals_Wh, scaling, self._softcap, len(rows.lengths_S), rows.tables_SN.stride(0),
            query_hTD.stride(1), query_hTD.stride(0), SHAPE=shape, STRIDES=CacheStrides.of(cache),
            num_warps=self._split.num_warps, num_stages=self._split.num_stages,
        )  # fmt: skip
        kernels.merge_splits[(len(rows.lengths_S), len(query_hTD))](
            sums_WhE, highest_Wh, totals_Wh, out_ThE if sinks is None else sinks, rows.first_tokens_O, pieces.offsets_O,
            out_ThE, SHAPE=shape, num_warps=2,
        )  # fmt: skip

    def _attend_chunks(
        self,
        cache: LayerCache,
        query_hTD: torch.Tensor,
        rows: PagedRows,
        pieces: Pieces,
        scaling: float,
        sinks: torch.Tensor | None,
        out_ThE: torch.Tensor,
    ) -> None:
        """The sequences with several tokens in the step, a tile of them after the other."""
        shape = self._chunk.shape
        kernels.attend_chunks[(len(pieces.pieces_W2), shape.num_kv_heads * shape.parts)](
            query_hTD, cache.keys_NbHD, cache.values_NbHD, rows.tables_SN, rows.lengths_S, rows.first_tokens_O, *pieces,
            out_ThE if sinks is None else sinks, out_ThE, scaling, self._softcap, len(rows.lengths_S),
            rows.tables_SN.stride(0), query_hTD.stride(1), query_hTD.stride(0), SHAPE=shape,
            STRIDES=CacheStrides.of(cache), num_warps=self._chunk.num_warps, num_stages=self._chunk.num_stages,
        )  # fmt: skip


def _plan(rows: PagedRows, shape: AttentionShape, most_pieces: int) -> Pieces:
    pieces = Pieces(rows.lengths_S.new_empty(most_pieces, 2), rows.first_tokens_O.new_empty(len(rows.first_tokens_O)))
    kernels.plan_work[(len(rows.lengths_S),)](rows.lengths_S, rows.first_tokens_O, *pieces, SHAPE=shape, num_warps=1)
    return pieces
