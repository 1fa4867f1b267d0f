"""The Runner of an accelerator: decode over static buffers, ids stay on the device, the host waits for none of them.

Steps of one token a sequence run as DecodeSteps (on CUDA as graphs); prefill and mixed steps run as on CPU, after the
ids that are still on their way. It runs on CPU too, without graphs, where the tests hold it against the Runner.
"""

from collections import deque
from functools import cached_property
from pathlib import Path

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.buckets import Bucket, Buckets
from actors.tensors.attention.layer import StepAttention
from actors.tensors.attention.metadata_builder import Chunk, VisibilityMaker
from actors.tensors.backends.cuda.attention import GatheredAttention, PagedRows, VarlenKernel, choose_kernels
from actors.tensors.backends.cuda.decode_graph import Runnable, capture
from actors.tensors.backends.cuda.decode_step import LAST_ID, DecodeRows, DecodeStep, LastIds
from actors.tensors.backends.cuda.module_kernels import fuse
from actors.tensors.backends.cuda.transfer import Download, to_device
from actors.tensors.runner import Done, Groups, Launched, Runner, Sampled
from actors.tensors.sampling.sampler import SamplingBatch
from actors.tensors.sequence_table import ROWS_AT_FIRST, Row, StepTensors
from actors.tensors.weights.checkpoint import LoadReport, Progress
from actors.words.messages import StepBatch, TokenLogprobs

_TOKENS_GATHERED = 1024  # the smallest table that a decode step gathers whole


def runner_type(device: torch.device) -> type[Runner]:
    """What runs the steps of a rank on this device."""
    return DeviceRunner if device.type == "cuda" else Runner


class PagedVisibility(VisibilityMaker):
    """Gives the block tables with each step: attentions that have a kernel need nothing else."""

    def of_step(self, chunks: list[Chunk], tables: torch.Tensor, asked: list[int] | None = None) -> StepAttention:
        """See VisibilityMaker; `mask_specs` are only those of attentions without a kernel."""
        step = super().of_step(chunks, tables)
        max_keys = max(chunk.end for chunk in chunks)
        num_blocks = num_blocks_for(max_keys, self.block_size)
        counts_S = torch.tensor([chunk.num_tokens for chunk in chunks])
        on_host = (
            tables[[chunk.table for chunk in chunks], :num_blocks],
            torch.tensor([chunk.end for chunk in chunks]),
            torch.nn.functional.pad(counts_S.cumsum(0), (1, 0)),
            torch.arange(len(chunks) + 1) * max_keys,
        )
        tables_SN, lengths_S, first_tokens, first_keys = (to_device(x.int(), self.device) for x in on_host)
        rows = PagedRows(tables_SN, lengths_S, first_tokens, first_keys, int(counts_S.max()), max_keys)
        return StepAttention(step.slots_T, step.by_mask, rows=rows)


class Sampling:
    """What a decode step sampled, while its ids are on their way; see Launched."""

    def __init__(self, rows: tuple[Row, ...], ids: Download, logprobs: list[list[TokenLogprobs]]) -> None:
        self._rows = [(row, len(row.ids)) for row in rows]
        self._ids = ids
        self._logprobs = logprobs
        self._taken: Sampled | None = None
        for row in rows:
            row.ids.append(0)  # until it is known

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return self._taken is not None or self._ids.is_ready()

    def take(self) -> Sampled:
        """Wait for the ids, and tell the rows."""
        if self._taken is None:
            ids = self._ids.take().tolist()
            for (row, place), token_id in zip(self._rows, ids, strict=True):
                if place < len(row.ids):  # else the row was begun anew
                    row.ids[place] = max(0, token_id)
            self._taken = Sampled([[token_id] for token_id in ids], self._logprobs, [])
        return self._taken


class DeviceRunner(Runner):
    """See the module. Block `num_blocks` of its cache belongs to padding."""

    spare_blocks = 1
    fuses = True  # whether norms and rotary embeddings are fused on CUDA

    def __init__(self, plan: Plan, rank: int, groups: Groups, device: torch.device) -> None:
        self._buckets = Buckets((), ())
        super().__init__(plan, rank, groups, device)
        num_places = 2 * max(ROWS_AT_FIRST, plan.scheduler.max_num_seqs)  # the table doubles
        self._last_ids = LastIds(num_places, device)

    def join(self, groups: Groups) -> None:
        """See Runner. Graphs hold the groups of their epoch: those of an old one are dropped."""
        self._steps: dict[Bucket, Runnable] = {}
        self._unsettled: deque[Sampling] = deque()
        super().join(groups)

    @cached_property
    def _kernels(self) -> dict[str, VarlenKernel]:
        """By attention."""
        specs = [shard.local_spec for shard in self.shard.attentions]
        return choose_kernels(specs, self.dtype, self.plan.block_size, self.device)

    def _visibility(self) -> VisibilityMaker:
        others = [shard.spec for shard in self.shard.attentions if shard.spec.name not in self._kernels]
        maker = PagedVisibility if self._kernels else VisibilityMaker
        return maker(self.plan.block_size, frozenset(spec.mask_spec for spec in others), self.dtype, self.device)

    def load(self, folder: Path, progress: Progress | None = None) -> LoadReport:
        """See Runner."""
        report = super().load(folder, progress)
        if self.device.type == "cuda" and self.fuses:
            assert self.model is not None
            fuse(self.model.module)
        return report

    def allocate_cache(self, num_blocks: int) -> None:
        """See Runner; one block more is padding's."""
        super().allocate_cache(num_blocks)
        assert self.model is not None
        self._trash_block = num_blocks
        for attention in self.model.attentions:
            kernel = self._kernels.get(attention.spec.name)
            attention.paged = kernel or GatheredAttention(attention.spec.mask_spec, attention.spec.softcap)
        longest = self.plan.num_blocks_for_longest
        gathers = len(self._kernels) < len(self.model.attentions)
        first_blocks = min(longest, num_blocks_for(_TOKENS_GATHERED, self.plan.block_size)) if gathers else None
        self._buckets = Buckets.of(self.plan.scheduler.max_num_seqs, longest, first_blocks)
        self._steps.clear()
        self._state_BH = None
        if self.groups.previous is not None:
            shape = (self.plan.scheduler.max_num_seqs, *self.plan.spec.state_shape)
            self._state_BH = torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """See Runner; on CUDA, decode steps are captured."""
        super().warm_up()
        self._settle()
        if self.device.type == "cuda":
            captured = capture({bucket: self._new_step(bucket) for bucket in self._buckets.all()}, self.groups.stage)
            self._steps = dict(captured)
            assert self.model is not None
            self.model.take_exchange_s()  # what came before is no step

    def execute(self, step: StepBatch) -> Sampled | None:
        """See Runner."""
        return self.launch(step).take()

    @torch.inference_mode()
    def launch(self, step: StepBatch) -> Launched:
        """See Runner: a decode step is only launched; what it samples comes later."""
        while self._unsettled and self._unsettled[0].is_ready():
            self._unsettled.popleft().take()
        bucket = self._bucket_of(step)
        if bucket is not None:
            return self._launch_decode(step, bucket)
        self._settle()
        return Done(super().execute(step))

    def _bucket_of(self, step: StepBatch) -> Bucket | None:
        """The shape that a step has when it only decodes."""
        if not step.entries or any(len(e.ids) > 1 or not e.sample or e.prompt_logprobs for e in step.entries):
            return None
        last = max(entry.start for entry in step.entries)
        return self._buckets.of_step(len(step.entries), last // self.plan.block_size + 1)

    def _launch_decode(self, step: StepBatch, bucket: Bucket) -> Launched:
        assert self.model is not None
        self._begin(step)
        rows, num_rows = tuple(self.table.rows[entry.seq] for entry in step.entries), len(step.entries)
        decode = self._steps.get(bucket) or self._steps.setdefault(bucket, self._new_step(bucket))
        decode.fill(self._decode_rows(step, rows))
        if self.groups.previous is not None:
            assert self._state_BH is not None
            self.clock.lap("compute")
            self.groups.previous.receive(self._state_BH[:num_rows])
            self.clock.lap("receive")
        output = decode.run()[:num_rows]
        self.clock.within("exchange", self.model.take_exchange_s())
        self.clock.lap("compute")
        if self.groups.next is None:
            sampling = self._launch_sampling(step, rows, output, decode.places(num_rows))
            self.clock.lap("sample")
            return sampling
        self._send(self.groups.next, step.lane, output.clone())  # a graph's output is written anew by its next replay
        self.clock.lap("send")
        if self._receiver is not None:
            self._receiver.expect(step, rows)
        return Done(None)

    def _launch_sampling(
        self, step: StepBatch, rows: tuple[Row, ...], logits_RV: torch.Tensor, places_R: torch.Tensor
    ) -> Sampling:
        draws = [self.table.draw(entry) for entry in step.entries]
        if any(draw.has_penalties for draw in draws):
            self._settle()  # they count every id before this one
        sampled_ids_R, ids_R = self._draw(step, logits_RV, SamplingBatch.of(draws, self.device))
        self._last_ids.put(places_R, ids_R)
        logprobs = self._sampled_logprobs(rows, logits_RV, ids_R)  # where they are asked for, the host waits
        self._unsettled.append(Sampling(rows, Download(sampled_ids_R), logprobs))
        return self._unsettled[-1]

    def _sample(self, step: StepBatch, tensors: StepTensors, logits_QV: torch.Tensor) -> Sampled:
        """Of a step that is not decode alone: the device is told too what was sampled."""
        sampled = super()._sample(step, tensors, logits_QV)
        if tensors.sampled:
            places = torch.tensor([row.index for row in tensors.sampled])
            ids = torch.tensor([row.ids[-1] for row in tensors.sampled])
            self._last_ids.put(to_device(places, self.device), to_device(ids, self.device))
        return sampled

    def _decode_rows(self, step: StepBatch, rows: tuple[Row, ...]) -> DecodeRows:
        samples_here = self.groups.next is None
        ids = [
            entry.ids[0] if entry.ids else LAST_ID if samples_here else row.ids[entry.start]
            for entry, row in zip(step.entries, rows, strict=True)
        ]
        positions, places = [entry.start for entry in step.entries], [row.index for row in rows]
        assert max(places) < self._last_ids.padding, "more sequences are open than scheduler.max_num_seqs allows"
        return DecodeRows(ids, positions, places, self.table.tables)

    def _new_step(self, bucket: Bucket) -> DecodeStep:
        assert self.model is not None
        return DecodeStep(bucket, self.model, self._last_ids, self._trash_block, self.plan.block_size, self._state_BH)

    def _settle(self) -> None:
        """Wait for all ids that are on their way."""
        while self._unsettled:
            self._unsettled.popleft().take()
