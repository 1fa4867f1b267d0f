"""Attention through the paged cache equals plain attention: windows, chunks, groups of rows, leftovers in blocks."""

import random

import pytest
import torch

from actors.decisions.model.shard_plan import AttentionShard
from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.attention import metadata_builder
from actors.tensors.attention.kv_cache import KVCache
from actors.tensors.attention.metadata import Chunk, LayerCache, StepLayout
from actors.tensors.attention.metadata_builder import AttentionMetadataBuilder
from actors.tensors.backends.cpu.attention import CPUAttention
from actors.tensors.backends.reference import ReferenceAttention, ReferenceBackend
from actors.tensors.model.attention_layer import CurrentStep, LayerAttention

CPU = torch.device("cpu")
NUM_BLOCKS, KV_HEADS, GROUPS, DIM, VALUE_DIM = 80, 2, 3, 8, 6
SCALING = 0.3


def written_out(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Query [T, heads, D] at positions from `start` on; keys and values [K, KV heads, *] from 0 on → [T, heads, *]."""
    keys, values = keys.repeat_interleave(GROUPS, 1), values.repeat_interleave(GROUPS, 1)
    out = query.new_empty(*query.shape[:2], values.shape[2])
    window, chunk = spec.mask_spec.window, spec.mask_spec.chunk
    for token in range(query.shape[0]):
        position = start + token
        first = 0 if window is None else max(0, position + 1 - window)
        while chunk is not None and first // chunk < position // chunk:
            first += 1
        for head in range(query.shape[1]):
            scores = keys[first : position + 1, head] @ query[token, head] * SCALING
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].exp())
            out[token, head] = weights / total @ values[first : position + 1, head]
    return out


class Sequence:
    def __init__(self, table: int, length: int, blocks: list[int]) -> None:
        self.table, self.blocks = table, blocks
        self.query = torch.randn(length, KV_HEADS * GROUPS, DIM)
        self.keys = torch.randn(length, KV_HEADS, DIM)
        self.values = torch.randn(length, KV_HEADS, VALUE_DIM)
        self.done = 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_random_worlds_equal_attention_written_out(seed: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    world = random.Random(seed)
    monkeypatch.setattr(metadata_builder, "_TILE", world.choice((1, 3, 256)))
    monkeypatch.setattr(metadata_builder, "_KEYS_AT_ONCE", world.choice((1, 60, 1 << 17)))
    specs = [
        AttentionSpec("", KV_HEADS * GROUPS, KV_HEADS, DIM, VALUE_DIM, mask_spec, softcap, has_sinks)
        for mask_spec in (
            MaskSpec(),
            MaskSpec(window=world.choice((1, 2, 5, 100))),
            MaskSpec(chunk=world.choice((1, 3, 8))),
        )
        for softcap, has_sinks in ((None, False), (world.choice((None, 0.7)), world.random() < 0.5))
    ]
    shards = [AttentionShard(spec, (0, KV_HEADS * GROUPS), (0, KV_HEADS)) for spec in specs[:1]]
    cache = KVCache(shards, NUM_BLOCKS * 8 // block_size, block_size, torch.float32, CPU)
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))  # what others left behind
    upload, masks = ReferenceBackend(CPU).upload, frozenset(spec.mask_spec for spec in specs)
    if world.random() < 0.5:  # by kernels, prompts up to a length too
        attention = CPUAttention(specs, torch.float32, block_size, upload)
        longest = world.choice((0, 15, 40))
        attention._builder = AttentionMetadataBuilder(block_size, masks, torch.float32, upload, True, longest)
    else:  # in groups, written out
        attention = ReferenceAttention(AttentionMetadataBuilder(block_size, masks, torch.float32, upload))
    free = list(range(cache.num_blocks))
    world.shuffle(free)
    lengths = [world.randint(1, 40) for _ in range(6)]
    sequences = [
        Sequence(i, length, [free.pop() for _ in range(-(-length // block_size))]) for i, length in enumerate(lengths)
    ]
    tables = torch.zeros(6, 40, dtype=torch.int64)
    for sequence in sequences:
        tables[sequence.table, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        cache.clear(torch.tensor(sequence.blocks))
    current = CurrentStep()
    while active := [s for s in sequences if s.done < len(s.keys)]:
        counts = {s: min(world.choice((1, 1, 1, 2, 9)), len(s.keys) - s.done) for s in active}
        chunks, order = [], sorted(active, key=lambda s: counts[s] > 1)
        row = 0
        for s in order:
            chunks.append(Chunk(s.table, row, s.done, counts[s]))
            row += counts[s]
        current.begin(attention.plan(StepLayout(chunks, tables)))
        spans = [slice(s.done, s.done + counts[s]) for s in order]
        query, keys, values = (
            torch.cat([getattr(s, name)[span] for s, span in zip(order, spans, strict=True)]).transpose(0, 1)
            for name in ("query", "keys", "values")
        )
        for spec in specs:
            keys_NbHD, values_NbHD = cache.tensors
            layer = LayerAttention(LayerCache(spec, keys_NbHD, values_NbHD), attention, current)
            sinks = torch.randn(KV_HEADS * GROUPS) if spec.has_sinks else None
            out = layer.attend(query, keys, values, SCALING, sinks)
            expected = [
                written_out(s.query[span], s.keys, s.values, span.start, spec, sinks)
                for s, span in zip(order, spans, strict=True)
            ]
            torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)
        for s in order:
            s.done += counts[s]


def builder(mask_spec: MaskSpec) -> AttentionMetadataBuilder:
    return AttentionMetadataBuilder(4, frozenset({mask_spec}), torch.float16, ReferenceBackend(CPU).upload)


def test_rows_of_similar_length_share_a_group_and_long_ones_do_not_pad_short_ones() -> None:
    made_by = builder(MaskSpec())
    starts = [3, 4, 5, 40, 41, 500]
    chunks = [Chunk(i, i, start, 1) for i, start in enumerate(starts)]
    tables = torch.arange(6 * 200).view(6, 200)
    groups = made_by.build(StepLayout(chunks, tables)).by_mask[MaskSpec()].groups
    assert [(group.rows.start, group.rows.stop) for group in groups] == [(0, 3), (3, 5), (5, 6)]
    padded = sum(group.tables_BN.numel() for group in groups)
    assert padded <= 2 * sum(start // 4 + 1 for start in starts)


def test_a_window_gathers_no_more_blocks_than_it_covers() -> None:
    made_by = builder(MaskSpec(6))
    groups = (
        made_by.build(StepLayout([Chunk(0, 0, 1001, 1)], torch.arange(300).view(1, 300))).by_mask[MaskSpec(6)].groups
    )
    assert groups[0].tables_BN.tolist() == [[249, 250]]
    assert (groups[0].mask_B11K == 0).sum() == 6


def test_padding_names_blocks_of_the_same_sequence_only() -> None:
    made_by = builder(MaskSpec())
    tables = torch.tensor([[11, 12, 0, 0], [21, 22, 23, 24]])
    [group] = made_by.build(StepLayout([Chunk(0, 0, 7, 1), Chunk(1, 1, 15, 1)], tables)).by_mask[MaskSpec()].groups
    assert group.tables_BN.tolist() == [[11, 12, 12, 12], [21, 22, 23, 24]]
