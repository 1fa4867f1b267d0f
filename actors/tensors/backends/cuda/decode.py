"""The decoder of a GPU: steps of one token a row over static buffers, a CUDA graph each; ids stay on the device.

It runs on CPU too, without graphs, where the tests compare it with eager steps.
"""

from collections.abc import Sequence

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.buckets import Bucket, Buckets
from actors.tensors.backend import DecodeRows, RankModel, Upload
from actors.tensors.backends.cuda.attention import CUDAAttention
from actors.tensors.backends.cuda.decode_graph import Runnable, capture
from actors.tensors.backends.cuda.decode_step import DecodeStep, LastIds
from actors.tensors.sequence_table import max_table_rows
from cluster.collectives.interface import StageGroup

_TOKENS_GATHERED = 1024  # tokens of the smallest block table that a decode step gathers whole


class CUDADecoder:
    """See Decoder."""

    def __init__(self, model: RankModel, plan: Plan, padding_block: int, device: torch.device, upload: Upload) -> None:
        """`padding_block` belongs to no sequence: padding rows write there."""
        attention = model.attention
        assert isinstance(attention, CUDAAttention), "a model attends through its device's backend"
        self._model = model
        self._block_size = plan.block_size
        self._padding_block = padding_block
        self._upload = upload
        self._last_ids = LastIds(max_table_rows(plan.scheduler.max_num_seqs), device)
        longest = plan.num_blocks_for_longest
        gathers = len(attention.kernels) < len(model.shard.attentions)
        first_blocks = min(longest, num_blocks_for(_TOKENS_GATHERED, plan.block_size)) if gathers else None
        self.buckets = Buckets.of(plan.scheduler.max_num_seqs, longest, first_blocks)
        self.steps: dict[Bucket, Runnable] = {}
        self._state_BH = None
        if not model.shard.has_embedding:
            shape = (plan.scheduler.max_num_seqs, *plan.spec.state_shape)
            self._state_BH = torch.zeros(shape, dtype=getattr(torch, plan.spec.dtype), device=device)
        self._table_rows: list[int] = []  # of the step that was filled in last
        self._step: Runnable | None = None

    def takes(self, num_rows: int, last_position: int) -> bool:
        """See Decoder."""
        return self._bucket(num_rows, last_position) is not None

    def fill(self, rows: DecodeRows) -> None:
        """See Decoder."""
        bucket = self._bucket(len(rows.ids), max(rows.positions))
        assert bucket is not None, "takes comes first"
        assert max(rows.table_rows) < self._last_ids.padding, "more sequences are open than scheduler.max_num_seqs"
        self._step = self.steps.get(bucket) or self.steps.setdefault(bucket, self._new_step(bucket))
        self._table_rows = rows.table_rows
        self._step.fill(rows)

    def state(self, num_rows: int) -> torch.Tensor:
        """See Decoder."""
        assert self._state_BH is not None, "the first stage receives no hidden states"
        return self._state_BH[:num_rows]

    def run(self) -> torch.Tensor:
        """See Decoder."""
        assert self._step is not None, "fill comes first"
        output = self._step.run()[: len(self._table_rows)]
        # A graph's next replay overwrites its output: logits are read before it, but a send may still be running then
        return output if self._model.shard.has_head else output.clone()

    def remember(self, table_rows: Sequence[int], ids_R: torch.Tensor) -> None:
        """See Decoder."""
        if self._step is not None and table_rows == self._table_rows:
            on_device = self._step.table_rows(len(table_rows))
        else:
            on_device = self._upload(torch.tensor(table_rows))
        self._last_ids.put(on_device, ids_R)

    def capture(self, group: StageGroup) -> None:
        """See Decoder: a graph for each shape, where there are graphs."""
        if self._last_ids.ids_P.is_cuda:
            self.release()  # steps that ran before the capture have other buffers
            self.steps = dict(capture({bucket: self._new_step(bucket) for bucket in self.buckets.all()}, group))

    def release(self) -> None:
        """See Decoder: graphs hold the groups of their epoch."""
        self.steps.clear()
        self._step = None

    def _bucket(self, num_rows: int, last_position: int) -> Bucket | None:
        return self.buckets.of_step(num_rows, last_position // self._block_size + 1)

    def _new_step(self, bucket: Bucket) -> DecodeStep:
        return DecodeStep(bucket, self._model, self._last_ids, self._padding_block, self._block_size, self._state_BH)
