"""The Runner: everything that a rank computes, from loading its weights to the ids of a step, without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.phase_clock import PhaseClock
from actors.tensors.attention.kv_cache import KVCache
from actors.tensors.backend import Backend, GraphRunner
from actors.tensors.feedback import FeedbackReceiver, FeedbackSender
from actors.tensors.launched import Done, Launched, Sampled
from actors.tensors.model.stage_model import StageModel, build
from actors.tensors.sampled_ids import SampledIds
from actors.tensors.sampling.grammar_masks import Grammars
from actors.tensors.sampling.logprobs import LogprobReader
from actors.tensors.sampling.sampler import Sampler
from actors.tensors.sequence_table import PromptChunk, Row, SequenceTable, StepTensors, max_table_rows
from actors.tensors.step_sampler import StepSampler
from actors.tensors.weights.checkpoint import LoadReport, Progress, load_weights
from actors.words.messages import Bucket, Entry, NewSequence, SamplingParams, StepBatch, Substitution
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
        self.graphs: GraphRunner | None = None
        scheduler = plan.scheduler
        num_positions = scheduler.num_lanes * scheduler.depth + 1  # ids that may be on their way at a time
        self._sampled_ids = SampledIds(max_table_rows(scheduler.max_num_seqs), num_positions, backend.device)
        self._grammars = Grammars(self.shard.vocab_rows, plan.spec.vocab_size) if neighbors.next is None else None
        self.num_blocks = 0  # of the cache, those for padding not counted
        self.join(neighbors)

    def join(self, neighbors: Neighbors) -> None:
        """Take the neighbors of a new epoch. Rows and sends of the old one are forgotten; weights and cache stay."""
        self.neighbors = neighbors
        self.clock = PhaseClock()
        vocabulary = neighbors.stage, self.shard.vocab_rows, self.plan.spec.vocab_size
        backend = self.backend
        self.sampler = Sampler(*vocabulary, backend.best_tokens, backend.runs_ahead, backend.lowest_kept)
        logprobs = LogprobReader(*vocabulary, self.backend.download)
        self._sampling = StepSampler(self.backend, self.sampler, logprobs, self._sampled_ids, self._grammars)
        self._receiver = self._sender = None
        if self.plan.scheduler.depth > 1 and neighbors.feedback is not None:
            if self.is_first_stage:
                self._receiver = FeedbackReceiver(neighbors.feedback, self.backend.device, self._sampling.keep)
            else:
                self._sender = FeedbackSender(neighbors.feedback)
        self.table = self._new_table()
        self._sendings: dict[int, tuple[Sending, torch.Tensor]] = {}  # by lane
        if self.model is not None:
            self.model.join(neighbors.stage)
        if self.graphs is not None:
            self.graphs.release()

    def _new_table(self) -> SequenceTable:
        knows_samples = self._receiver is not None or self.neighbors.next is None
        longest, block_size = self.plan.num_blocks_for_longest, self.plan.block_size
        return SequenceTable(longest, block_size, self.attention, self.backend.upload, self._sampled_ids, knows_samples)

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
        if self._grammars is not None:
            self._grammars.load(folder)
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

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache, and fit the plan to it. Raises ValueError when the longest sequence does not fit."""
        self.plan = self.plan.fitted(num_blocks)
        self.put_cache(num_blocks)
        assert self.model is not None
        padding_blocks = range(num_blocks, num_blocks + self.backend.num_padding_blocks)
        self.graphs = self.backend.graph_runner(self.model, self.plan, padding_blocks, self._sampled_ids)

    def put_cache(self, num_blocks: int) -> None:
        """Allocate a KV cache of any size, with an empty table."""
        assert self.model is not None, "load comes first"
        self.table = self._new_table()
        self.num_blocks, device = num_blocks, self.backend.device
        num_all = num_blocks + self.backend.num_padding_blocks
        self.cache = KVCache(self.shard.attentions, num_all, self.plan.block_size, self.dtype, device)
        self.model.attach(self.cache)

    def drop_cache(self) -> None:
        """Free the KV cache, and what was kept of steps over it; another one must follow before the next step."""
        self._sampling.settle()
        for sending, _ in self._sendings.values():
            sending.wait()
        self._sendings.clear()
        self.put_cache(0)

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
        self._sampling.settle()
        self.clock = PhaseClock()  # warming up is no step

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The shapes of steps that can be captured in graphs; none where the device has no graphs."""
        return self.graphs.buckets.shapes if self.graphs is not None and self.graphs.can_capture else ()

    @torch.inference_mode()
    def capture(self, bucket: Bucket) -> str | None:
        """Capture a shape, between two steps and on all ranks together → None, or why it failed."""
        assert self.graphs is not None and self.model is not None, "there is nothing to capture"
        reason_not = self.graphs.capture(bucket, self.neighbors.stage)
        self.model.take_exchange_s()
        return reason_not

    def execute(self, step: StepBatch) -> Sampled | None:
        """Run one step → its results, on every shard of the last stage; None on the other stages."""
        return self.launch(step).take()

    @torch.inference_mode()
    def launch(self, step: StepBatch) -> Launched:
        """Start one step; the ids that it samples may reach the host later."""
        self._sampling.catch_up()
        self._begin(step)
        is_last = self.neighbors.next is None
        if not step.entries:
            return Done(Sampled([], [], []) if is_last else None)
        work = self._static_work(step) or self._packed_work(step)
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

    def _begin(self, step: StepBatch) -> None:
        """Apply what a step changes: ids that come back from the last stage, rows, and blocks to be zeroed."""
        assert self.cache is not None, "allocate_cache comes first"
        for feedback in (self._receiver, self._sender):
            if feedback is not None:
                feedback.catch_up(step)
                self.clock.lap("receive")
        fresh_blocks = self.table.apply(step)
        self._sampling.follow_grammars(step, self.table.rows)
        if fresh_blocks and self.attention.reads_unwritten:
            self.cache.clear(self.backend.upload(torch.tensor(fresh_blocks)))

    def _packed_work(self, step: StepBatch) -> _Work:
        tensors, state = self.table.tensors(step), None
        if self.neighbors.previous is not None:
            shape = (tensors.ids_T.shape[0], *self.plan.spec.state_shape)
            state = torch.empty(shape, dtype=self.dtype, device=self.backend.device)
        return _Work(tensors.sampled, state, lambda: self.forward(tensors, state), tensors.prompts)

    def _static_work(self, step: StepBatch) -> _Work | None:
        """The step over static buffers; None where it has no shape for that."""
        bucket = None if self.graphs is None else self.graphs.buckets.of_step(step.entries)
        if self.graphs is None or bucket is None:
            return None
        graphs, inputs = self.graphs, self.table.inputs(step)
        graphs.fill(bucket, inputs)
        num_tokens = len(inputs.ids)
        state = None if self.neighbors.previous is None else graphs.state(num_tokens)
        rows = tuple(self.table.rows[entry.seq] for entry in step.entries if entry.sample)

        def run_and_copy() -> torch.Tensor:
            return graphs.run()[:num_tokens].clone()  # a send may still be running when the next step overwrites it

        return _Work(rows, state, graphs.run if self.neighbors.next is None else run_and_copy)

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

    def _sample(self, step: StepBatch, work: _Work, logits_QV: torch.Tensor) -> Launched:
        def hand_back(ids_R: torch.Tensor) -> None:
            """The first stage needs them before the engine has them."""
            if self._sender is not None:
                self._sender.send(step, ids_R)

        sampling = self.table.sampling_rows(step)
        return self._sampling.sample(sampling, work.rows, work.prompts, logits_QV, hand_back)

    def _send(self, lane: int, hidden_TH: torch.Tensor) -> None:
        """Start a send; its buffer is kept until the same lane sends again."""
        assert self.neighbors.next is not None
        if lane in self._sendings:
            self._sendings.pop(lane)[0].wait()
        hidden_TH = hidden_TH.contiguous()
        self._sendings[lane] = (self.neighbors.next.send(hidden_TH), hidden_TH)
