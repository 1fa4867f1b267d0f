"""One decode step over static buffers: a token a row, every shape fixed by its bucket, no waiting for the device.

B rows, padding included · N blocks of a table · C = 3 + N columns of the inputs · H hidden size · V vocabulary ·
P rows of the sequence table, and one for padding. It runs the same on every device; on CUDA a graph holds it.
"""

from array import array

import torch

from actors.decisions.schedule.buckets import Bucket
from actors.tensors.attention.metadata import PagedRows
from actors.tensors.backend import LAST_ID, DecodeRows, RankModel
from actors.tensors.backends.cuda.attention import CUDAAttention

_ID, _POSITION, _TABLE_ROW, _TABLE = 0, 1, 2, 3  # columns; the block table is the rest


class LastIds:
    """The id that each row of the sequence table sampled last, on the device; one more entry is for padding rows."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.ids_P = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.padding = num_rows

    def put(self, rows_R: torch.Tensor, ids_R: torch.Tensor) -> None:
        """Remember the ids that rows sampled; both int64."""
        self.ids_P.index_copy_(0, rows_R, ids_R)


class DecodeStep:
    """One bucket's buffers, and the model run over them. Padding rows write to a block that no sequence owns."""

    def __init__(
        self,
        bucket: Bucket,
        model: RankModel,
        last_ids: LastIds,
        padding_block: int,
        block_size: int,
        state: torch.Tensor | None,
    ) -> None:
        """`state`: the buffer [B or more, H] for hidden states of the stage before; None on the first stage."""
        self.bucket = bucket
        assert isinstance(model.attention, CUDAAttention), "a model attends through its device's backend"
        self._model, self._attention = model, model.attention
        self._last_ids = last_ids
        self._block_size = block_size
        self._state_BH = None if state is None else state[: bucket.num_rows]
        device = last_ids.ids_P.device
        row = [0, 0, last_ids.padding, *[padding_block] * bucket.num_blocks]
        self._padding_C = torch.tensor(row, dtype=torch.int32)
        self._inputs_BC = self._padding_C.to(device).repeat(bucket.num_rows, 1)
        self._rows_B = torch.arange(bucket.num_rows, device=device)

    def fill(self, rows: DecodeRows) -> None:
        """Copy a step's inputs into the buffers, without waiting for the device."""
        num_rows, device = len(rows.ids), self._inputs_BC.device
        on_host_BC = torch.empty(self._inputs_BC.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        numbers_3R = torch.frombuffer(array("i", rows.ids + rows.positions + rows.table_rows), dtype=torch.int32)
        on_host_BC[:num_rows, :_TABLE] = numbers_3R.view(_TABLE, num_rows).T
        on_host_BC[:num_rows, _TABLE:] = rows.tables[rows.table_rows, : self.bucket.num_blocks]
        on_host_BC[num_rows:] = self._padding_C
        self._inputs_BC.copy_(on_host_BC, non_blocking=True)

    def table_rows(self, num_rows: int) -> torch.Tensor:
        """The sequence table's rows of the first `num_rows` rows, int64 [R], on the device."""
        return self._inputs_BC[:num_rows, _TABLE_ROW].long()

    def run(self) -> torch.Tensor:
        """→ hidden states [B, H], or on the last stage logits [B, V]; padding rows mean nothing."""
        ids_B, positions_B, table_rows_B = self._inputs_BC[:, :_TABLE].long().unbind(1)
        ids_B = torch.where(ids_B == LAST_ID, self._last_ids.ids_P[table_rows_B], ids_B)
        tables_BN = self._inputs_BC[:, _TABLE:]
        blocks_B = tables_BN.gather(1, (positions_B // self._block_size).unsqueeze(1)).squeeze(1).long()
        slots_B = blocks_B * self._block_size + positions_B % self._block_size
        rows = PagedRows.decode(tables_BN, (positions_B + 1).int(), self._block_size)
        metadata = self._attention.plan_rows(slots_B, rows)
        return self._model.forward(ids_B, positions_B, self._rows_B, metadata, self._state_BH)
