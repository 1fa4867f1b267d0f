"""The Runner: everything that a rank computes, from loading its weights to the ids of a step, without Ray."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.phase_clock import PhaseClock
from actors.tensors.attention.kv_cache import KVCache
from actors.tensors.backend import LAST_ID, Backend, Decoder, DecodeRows
from actors.tensors.feedback import FeedbackReceiver, FeedbackSender
from actors.tensors.launched import Done, Launched, PendingSample, Sampled
from actors.tensors.model.stage_model import StageModel, build
from actors.tensors.sampling.logprobs import LogprobReader
from actors.tensors.sampling.sampler import Sampler, SamplingBatch
from actors.tensors.sequence_table import PromptChunk, Row, SequenceTable, StepTensors
from actors.tensors.weights.checkpoint import LoadReport, Progress, load_weights
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch, Substitution, TokenLogprobs
from cluster.collectives.interface import Link, Sending, StageGroup

_WARM_UP_SEQ = -1  # a number that the engine gives to no sequence


class Neighbors(Protocol):
    """The group and the links through which a rank exchanges tensors in one epoch."""

    @property
    def stage(self) -> StageGroup:
        """The shards of its stage."""

    @property
    def previous(self) -> Link | None:
        """From the stage before; None on the first."""

    @property
    def next(self) -> Link | None:
        """To the next stage; None on the last."""

    @property
    def feedback(self) -> Link | None:
        """From the last stage to the first; None on the stages between, and where there is one stage only."""


class _Work(NamedTuple):
    """One step, ready to run."""

    rows: tuple[Row, ...]  # that sample, in the order of the entries
    state: torch.Tensor | None  # where the hidden states of the stage before are received
    compute: Callable[[], torch.Tensor]  # → hidden states, or logits: of the rows, then of the prompts' ids
    prompts: tuple[PromptChunk, ...] = ()


class Runner:
    """Runs one rank's part of every step. One thread executes the steps, in the order of the channel."""

    def __init__(self, plan: Plan, rank: int, neighbors: Neighbors, backend: Backend) -> None:
        self.plan = plan
        self.shard = plan.shards[rank]
        self.backend = backend
        self.dtype: torch.dtype = getattr(torch, plan.spec.dtype)
        self.is_first_stage = plan.topology.is_first_stage(rank)
        specs = [attention.local_spec for attention in self.shard.attentions]
        self.attention = backend.attention(specs, self.dtype, plan.block_size)
        self.model: StageModel | None = None
        self.cache: KVCache | None = None
        self.decoder: Decoder | None = None
        self.num_blocks = 0  # of the cache, those for padding not counted
        self.join(neighbors)

    def join(self, neighbors: Neighbors) -> None:
        """Take the neighbors of a new epoch. Rows and sends of the old one are forgotten; weights and cache stay."""
        self.neighbors = neighbors
        self.clock = PhaseClock()
        vocabulary = neighbors.stage, self.shard.vocab_rows, self.plan.spec.vocab_size
        self.sampler = Sampler(*vocabulary, self.backend.best_tokens)
        self.logprobs = LogprobReader(*vocabulary)
        self._receiver = self._sender = None
        if self.plan.scheduler.depth > 1 and neighbors.feedback is not None:
            device = self.backend.device
            self._receiver = FeedbackReceiver(neighbors.feedback, device) if self.is_first_stage else None
            self._sender = None if self.is_first_stage else FeedbackSender(neighbors.feedback)
        self.table = self._new_table()
        self._sendings: dict[int, tuple[Sending, torch.Tensor]] = {}  # by lane
        self._pending: deque[PendingSample] = deque()
        if self.model is not None:
            self.model.join(neighbors.stage)
        if self.decoder is not None:
            self.decoder.release()

    def _new_table(self) -> SequenceTable:
        knows_samples = self._receiver is not None or self.neighbors.next is None
        longest, block_size = self.plan.num_blocks_for_longest, self.plan.block_size
        return SequenceTable(longest, block_size, self.attention, self.backend.upload, knows_samples)

    def part(self) -> None:
        """Drop what belongs to the neighbors of the epoch that has ended."""
        self._sendings.clear()
        self._receiver = self._sender = None

    @torch.inference_mode()
    def check_weights(self) -> None:
        """Read all weights. Raises FloatingPointError when one is not finite."""
        if self.model is not None and not self.model.is_finite():
            raise FloatingPointError("weights are not finite any more")

    def load(self, folder: Path, progress: Progress | None = None, substitutes: bool = True) -> LoadReport:
        """Build this rank's model and read its weights. Raises ValueError, UnsupportedModel or CheckpointError.

        `substitutes`: whether the backend may substitute modules of the model, and pack the weights.
        """
        group, device = self.neighbors.stage, self.backend.device
        self.attention.choose_kernels()
        self.model = build(self.plan, self.shard.rank, folder, group, device, self.attention)
        report = load_weights(self.model.sources, self.model.tensors(), progress)
        if substitutes:
            self.model.prepare(self.backend)
        return report

    @property
    def substitutions(self) -> list[Substitution]:
        """Which modules the backend substituted, and why it left others as they are."""
        return [*self.attention.substitutions, *([] if self.model is None else self.model.substitutions)]

    def num_blocks_that_fit(self, share: float, ranks_on_node: int) -> int:
        """Blocks of the KV cache that fit into a share of the free memory."""
        free_bytes = int(self.backend.free_bytes(ranks_on_node) * share)
        return free_bytes // self.plan.kv_bytes_per_block(self.shard.rank) - self.backend.num_padding_blocks

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache, and fit the plan to it. Raises ValueError when the longest sequence does not fit."""
        assert self.model is not None, "load comes first"
        self.plan = self.plan.fitted(num_blocks)
        self.table = self._new_table()
        self.num_blocks, device = num_blocks, self.backend.device
        num_all = num_blocks + self.backend.num_padding_blocks
        self.cache = KVCache(self.shard.attentions, num_all, self.plan.block_size, self.dtype, device)
        self.model.attach(self.cache)
        self.decoder = self.backend.decoder(self.model, self.plan, padding_block=num_blocks)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a short prompt and one more token, on all ranks together: one-time work is done before any request."""
        num_ids = min(self.plan.block_size, self.plan.max_model_len - 1)
        num_blocks = num_blocks_for(num_ids + 1, self.plan.block_size)
        prefill = Entry(_WARM_UP_SEQ, 0, [0] * num_ids, list(range(num_blocks)), sample=True)
        decode = Entry(_WARM_UP_SEQ, num_ids, [0], [], sample=True)
        opened = [NewSequence(_WARM_UP_SEQ, SamplingParams(temperature=1.0, seed=0), [])]
        self.execute(StepBatch(epoch=0, step=-2, lane=0, opened=opened, closed=[], entries=[prefill]))
        self.execute(StepBatch(epoch=0, step=-1, lane=0, opened=[], closed=[], entries=[decode]))
        self.execute(StepBatch(epoch=0, step=-1, lane=0, opened=[], closed=[_WARM_UP_SEQ], entries=[]))
        self._settle()
        if self.decoder is not None and self.model is not None:
            self.decoder.capture(self.neighbors.stage)
            self.model.take_exchange_s()
        self.clock = PhaseClock()  # warming up is no step

    def execute(self, step: StepBatch) -> Sampled | None:
        """Run one step → its results, on every shard of the last stage; None on the other stages."""
        return self.launch(step).take()

    @torch.inference_mode()
    def launch(self, step: StepBatch) -> Launched:
        """Start one step; the ids that it samples may reach the host later."""
        while self._pending and self._pending[0].is_ready():
            self._pending.popleft().take()
        is_decode = self._is_decode(step)
        if not is_decode:
            self._settle()  # its input tensors are made of ids that the host must know
        self._begin(step)
        is_last = self.neighbors.next is None
        if not step.entries:
            return Done(Sampled([], [], []) if is_last else None)
        work = self._decode_work(step) if is_decode else self._packed_work(step)
        output = self._compute(work)
        if is_last:
            pending = self._sample(step, work, output)
            self.clock.lap("sample")
            return pending
        self._send(step.lane, output)
        self.clock.lap("send")
        if self._receiver is not None:
            self._receiver.expect(step, work.rows)
        return Done(None)

    def _is_decode(self, step: StepBatch) -> bool:
        """Whether the decoder runs it: every entry has one token and samples, and the decoder has a shape for them."""
        entries = step.entries
        if self.decoder is None or not entries:
            return False
        if any(len(entry.ids) > 1 or not entry.sample or entry.prompt_logprobs for entry in entries):
            return False
        return self.decoder.takes(len(entries), max(entry.start for entry in entries))

    def _begin(self, step: StepBatch) -> None:
        """Apply what a step changes: ids that come back from the last stage, rows, and blocks to be zeroed."""
        assert self.cache is not None, "allocate_cache comes first"
        for feedback in (self._receiver, self._sender):
            if feedback is not None:
                feedback.catch_up(step)
                self.clock.lap("receive")
        fresh_blocks = self.table.apply(step)
        if fresh_blocks:
            self.cache.clear(self.backend.upload(torch.tensor(fresh_blocks)))

    def _packed_work(self, step: StepBatch) -> _Work:
        tensors, state = self.table.tensors(step), None
        if self.neighbors.previous is not None:
            shape = (tensors.ids_T.shape[0], *self.plan.spec.state_shape)
            state = torch.empty(shape, dtype=self.dtype, device=self.backend.device)
        return _Work(tensors.sampled, state, lambda: self.forward(tensors, state), tensors.prompts)

    def _decode_work(self, step: StepBatch) -> _Work:
        assert self.decoder is not None
        rows = tuple(self.table.rows[entry.seq] for entry in step.entries)
        samples_here = self.neighbors.next is None
        ids = [
            entry.ids[0] if entry.ids else LAST_ID if samples_here else row.ids[entry.start]
            for entry, row in zip(step.entries, rows, strict=True)
        ]
        positions, table_rows = [entry.start for entry in step.entries], [row.index for row in rows]
        self.decoder.fill(DecodeRows(ids, positions, table_rows, self.table.tables))
        state = None if self.neighbors.previous is None else self.decoder.state(len(rows))
        return _Work(rows, state, self.decoder.run)

    def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [tokens, hidden]; on the last stage logits [Q, vocabulary here]."""
        assert self.model is not None, "load comes first"
        return self.model.forward(tensors.ids_T, tensors.positions_T, tensors.logits_rows_Q, tensors.attention, state)

    def _compute(self, work: _Work) -> torch.Tensor:
        assert self.model is not None, "load comes first"
        if self.neighbors.previous is not None:
            assert work.state is not None
            self.clock.lap("compute")
            self.neighbors.previous.receive(work.state)
            self.clock.lap("receive")
        output = work.compute()
        self.clock.within("exchange", self.model.take_exchange_s())
        self.clock.lap("compute")
        return output

    def _sample(self, step: StepBatch, work: _Work, logits_QV: torch.Tensor) -> PendingSample:
        """Sample the next ids, remember them, and read the requested log-probabilities."""
        rows = self.table.sampling_rows(step)
        if any(row.has_penalties for row in rows):
            self._settle()  # they count every id before this one
        logits_RV = logits_QV[: len(rows)]
        sampled_ids_R = self.sampler.sample(logits_RV, SamplingBatch.of(rows, self.backend.upload))
        next_ids_R = sampled_ids_R.clamp(min=0)  # after NOT_A_NUMBER too, the next step may already be on its way
        if self._sender is not None:
            self._sender.send(step, next_ids_R)
        if self.decoder is not None and work.rows:
            self.decoder.remember([row.index for row in work.rows], next_ids_R)
        logprobs = self._sampled_logprobs(work.rows, logits_RV, next_ids_R)  # if requested, the host waits
        prompt_logprobs = self._prompt_logprobs(work.prompts, logits_QV[len(rows) :])
        ids = self.backend.download(sampled_ids_R)
        self._pending.append(PendingSample(work.rows, ids, Sampled([], logprobs, prompt_logprobs)))
        return self._pending[-1]

    def _sampled_logprobs(
        self, sampled: Sequence[Row], logits_RV: torch.Tensor, ids_R: torch.Tensor
    ) -> list[list[TokenLogprobs]]:
        num_top = {i: row.sampling.logprobs for i, row in enumerate(sampled) if row.sampling.logprobs is not None}
        if not num_top:
            return []
        rows_L = self.backend.upload(torch.tensor(list(num_top)))
        read = self.logprobs.read(logits_RV[rows_L], ids_R[rows_L], list(num_top.values()))
        by_row = dict(zip(num_top, read, strict=True))
        return [[by_row[i]] if i in by_row else [] for i in range(len(sampled))]

    def _prompt_logprobs(self, prompts: Sequence[PromptChunk], logits_LV: torch.Tensor) -> list[list[TokenLogprobs]]:
        if not prompts:
            return []
        ids = [token_id for chunk in prompts for token_id in chunk.ids]
        num_top = [chunk.num_top for chunk in prompts for _ in chunk.ids]
        ids_L = self.backend.upload(torch.tensor(ids, dtype=torch.int64))
        read = iter(self.logprobs.read(logits_LV, ids_L, num_top))
        return [list(islice(read, len(chunk.ids))) for chunk in prompts]

    def _send(self, lane: int, hidden_TH: torch.Tensor) -> None:
        """Start a send; its buffer is kept until the same lane sends again."""
        assert self.neighbors.next is not None
        if lane in self._sendings:
            self._sendings.pop(lane)[0].wait()
        hidden_TH = hidden_TH.contiguous()
        self._sendings[lane] = (self.neighbors.next.send(hidden_TH), hidden_TH)

    def _settle(self) -> None:
        """Wait for all sampled ids that are on their way to the host."""
        while self._pending:
            self._pending.popleft().take()
