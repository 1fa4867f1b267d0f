"""A step over static buffers: its shape is fixed by its bucket, and nothing waits for the device.

It runs the same on every device; on CUDA a graph holds it.

T tokens, padding included · S sequences, the last one holds the padding, O = S + 1 offsets · Q logits rows · N blocks
of a table · P rows of the sequence table, and one for padding · H hidden size · V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch

from actors.tensors.attention.metadata import Indices, PagedRows, positions_of
from actors.tensors.backend import RankModel, StepInputs
from actors.tensors.backends.cuda.attention import CUDAAttention
from actors.tensors.backends.cuda.transfer import StagingRing
from actors.tensors.sampled_ids import SampledIds
from actors.words.messages import Bucket

_LARGEST_UPDATE = 1024  # blocks that are brought with a step's inputs; more take copies of their own


class _Fields(NamedTuple):
    """A step's inputs, int32, one after the other in one buffer, on the host or on the device."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    table_rows_T: torch.Tensor
    first_tokens_O: torch.Tensor
    lengths_S: torch.Tensor
    table_rows_S: torch.Tensor
    logits_rows_Q: torch.Tensor

    @classmethod
    def sizes(cls, bucket: Bucket) -> list[int]:
        """Their lengths; in a decode step padding rows are sequences of one token, and none holds all padding."""
        num_seqs = bucket.num_seqs + (not bucket.is_decode)
        tokens = (bucket.num_tokens,) * 3
        return [*tokens, num_seqs + 1, num_seqs, num_seqs, bucket.num_seqs]

    @classmethod
    def of(cls, buffer: torch.Tensor, bucket: Bucket) -> "_Fields":
        """Views of a buffer."""
        sizes = cls.sizes(bucket)
        return cls(*torch.split(buffer[: sum(sizes)], sizes))


class StaticBuffers:
    """What all shapes of a rank share: their inputs, the block tables of all sequences, and their result."""

    def __init__(
        self,
        shapes: tuple[Bucket, ...],
        num_in_flight: int,
        num_results: int,
        padding_blocks: range,
        sampled_ids: SampledIds,
        state: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        """`num_results`: rows of the largest result.

        `padding_blocks`: those of the cache that no sequence owns.

        `state`: the buffer [T or more, H] for hidden states of the stage before; None on the first stage.
        """
        self.sampled_ids, self.state_TH = sampled_ids, state
        self._num_results = num_results
        num_inputs = max(sum(_Fields.sizes(shape)) for shape in shapes)
        self.inputs = torch.zeros(num_inputs + 2 * _LARGEST_UPDATE, dtype=torch.int32, device=device)
        self.ring = StagingRing(len(self.inputs), num_in_flight + 1, device)
        num_rows, num_blocks = sampled_ids.padding + 1, max(shape.num_blocks for shape in shapes)
        self.tables_PN = torch.full((num_rows, num_blocks), padding_blocks[0], dtype=torch.int32, device=device)
        # A mixed step's padding is one sequence: tokens of it that shared a slot would race for it
        columns = torch.arange(num_blocks, dtype=torch.int32, device=device)
        self.tables_PN[sampled_ids.padding] = padding_blocks[0] + columns % len(padding_blocks)
        self._result: torch.Tensor | None = None

    def fill(self, bucket: Bucket, inputs: StepInputs) -> None:
        """Copy a step's inputs to the device, and the blocks that the tables there lack, without waiting."""
        assert all(chunk.table < self.sampled_ids.padding for chunk in inputs.chunks), (
            "more sequences are open than scheduler.max_num_seqs"
        )
        on_host = self.ring.next()
        num_inputs = sum(_Fields.sizes(bucket))
        _write(_Fields.of(on_host, bucket), bucket, inputs, self.sampled_ids.padding)
        cells, blocks = _changed(inputs, self.tables_PN.shape[1])
        for first in range(0, max(1, len(cells)), _LARGEST_UPDATE):
            if first:
                on_host = self.ring.next()
            some = slice(first, first + _LARGEST_UPDATE)
            count = len(cells[some])
            update = on_host[num_inputs : num_inputs + 2 * count]
            update[:count], update[count:] = torch.from_numpy(cells[some]), torch.from_numpy(blocks[some])
            whole = num_inputs + 2 * count
            sent = slice(num_inputs if first else 0, whole)
            self.ring.send(self.inputs, sent)
            if count:
                cells_n, blocks_n = torch.split(self.inputs[num_inputs:whole], count)
                self.tables_PN.view(-1).index_copy_(0, cells_n.long(), blocks_n)

    def pad_state(self) -> None:
        """Fill the hidden states of the stage before with one row, not of zeros, for every token alike.

        In a decode step all padding shares a slot, so that rows which differ would race for it.
        """
        if self.state_TH is not None:
            row = torch.linspace(-1, 1, self.state_TH[0].numel(), device=self.state_TH.device)
            self.state_TH.copy_(row.view_as(self.state_TH[0]))

    def keep(self, result: torch.Tensor) -> torch.Tensor:
        """Copy a shape's result [n, *] into the buffer of all, so that graphs hold no memory for it → that copy."""
        if self._result is None:  # a step runs before any is captured
            self._result = result.new_empty(self._num_results, *result.shape[1:])
        return self._result[: len(result)].copy_(result)


def _write(fields: _Fields, bucket: Bucket, inputs: StepInputs, padding_row: int) -> None:
    """Fill in a step on the host; what is left of the shape is padding."""
    chunks, num_tokens = inputs.chunks, len(inputs.ids)
    counts = np.array([chunk.num_tokens for chunk in chunks], np.int64)
    table_rows = np.array([chunk.table for chunk in chunks], np.int64)
    ids_T, positions_T, table_rows_T, first_tokens_O, lengths_S, table_rows_S, logits_rows_Q = (
        field.numpy() for field in fields
    )
    num_padding = bucket.num_tokens - num_tokens
    ids_T[:num_tokens], ids_T[num_tokens:] = inputs.ids, 0
    positions_T[:num_tokens] = positions_of(chunks)
    positions_T[num_tokens:] = 0 if bucket.is_decode else np.arange(num_padding)
    table_rows_T[:num_tokens], table_rows_T[num_tokens:] = np.repeat(table_rows, counts), padding_row
    first_tokens_O[: len(chunks)] = np.cumsum(counts) - counts
    first_tokens_O[len(chunks) :] = num_tokens
    lengths_S[: len(chunks)], lengths_S[len(chunks) :] = [chunk.end for chunk in chunks], 1
    table_rows_S[: len(chunks)], table_rows_S[len(chunks) :] = table_rows, padding_row
    if bucket.is_decode:
        first_tokens_O[:] = np.arange(bucket.num_seqs + 1)
    else:
        first_tokens_O[-1], lengths_S[-1] = bucket.num_tokens, max(1, num_padding)
    logits_rows_Q[: len(inputs.logits_rows)], logits_rows_Q[len(inputs.logits_rows) :] = inputs.logits_rows, 0


def _changed(inputs: StepInputs, num_columns: int) -> tuple[Indices, Indices]:
    """The cells of the block tables (by row, one after the other) that the device lacks, and their blocks."""
    tables = inputs.tables.numpy()
    cells = [np.arange(stale.first, stale.end) + stale.table_row * num_columns for stale in inputs.stale]
    blocks = [tables[stale.table_row, stale.first : stale.end] for stale in inputs.stale]
    nothing = np.zeros(0, np.int64)
    return np.concatenate([nothing, *cells]), np.concatenate([nothing, *blocks])


class StaticStep:
    """One bucket's views of the buffers, and the model run over them. Padding writes to a block that is nobody's."""

    def __init__(self, bucket: Bucket, model: RankModel, buffers: StaticBuffers, block_size: int) -> None:
        self.bucket = bucket
        assert isinstance(model.attention, CUDAAttention), "a model attends through its device's backend"
        self._model, self._attention = model, model.attention
        self._buffers, self._block_size = buffers, block_size
        self._fields = _Fields.of(buffers.inputs, bucket)
        self._tokens_3T = buffers.inputs[: 3 * bucket.num_tokens].view(3, -1)
        self._state_TH = None if buffers.state_TH is None else buffers.state_TH[: bucket.num_tokens]

    def run(self) -> torch.Tensor:
        """→ hidden states [T, H], or on the last stage logits [Q, V]; rows of padding mean nothing."""
        fields, buffers, bucket = self._fields, self._buffers, self.bucket
        ids_T, positions_T, table_rows_T = self._tokens_3T.long().unbind(0)
        ids_T = buffers.sampled_ids.resolve(ids_T, table_rows_T, positions_T)
        tables_PN = buffers.tables_PN
        blocks_T = tables_PN[table_rows_T, positions_T // self._block_size].long()
        slots_T = blocks_T * self._block_size + positions_T % self._block_size
        rows = PagedRows(
            tables_PN[:, : bucket.num_blocks].index_select(0, fields.table_rows_S),
            fields.lengths_S,
            fields.first_tokens_O,
            max_tokens=bucket.num_tokens,
            max_single=len(fields.lengths_S),
            max_queries=1 if bucket.is_decode else bucket.num_tokens,
            max_keys=bucket.num_blocks * self._block_size,
        )
        metadata = self._attention.plan_rows(slots_T, positions_T, rows)
        output = self._model.forward(ids_T, positions_T, fields.logits_rows_Q.long(), metadata, self._state_TH)
        return buffers.keep(output)
