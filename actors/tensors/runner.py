"""The Runner: everything a rank computes, from loading its weights to the ids of a step. No Ray in it."""

import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.phase_clock import PhaseClock
from actors.tensors.attention.kv_cache import KVCache, available_bytes
from actors.tensors.attention.metadata_builder import VisibilityMaker
from actors.tensors.backends.cpu import paged_attention_avx512 as dot_attention
from actors.tensors.backends.cuda.transfer import to_device
from actors.tensors.feedback import FeedbackReceiver, FeedbackSender
from actors.tensors.model.stage_model import StageModel, build
from actors.tensors.sampling.logprobs import LogprobReader
from actors.tensors.sampling.sampler import Sampler, SamplingBatch
from actors.tensors.sequence_table import Row, SequenceTable, StepTensors
from actors.tensors.weights.checkpoint import LoadReport, Progress, load_weights
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch, TokenLogprobs
from cluster.collectives.interface import Link, Sending, StageGroup

logger = logging.getLogger(__name__)

_WARM_UP_SEQ = -1  # no engine numbers a sequence so


class Groups(Protocol):
    """A rank's neighbours."""

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
        """From the last stage to the first; None on the others, and where they are one."""


@dataclass(frozen=True)
class Sampled:
    """What a step brings, each list in the order of the entries; see StepResult."""

    token_ids: list[list[int]]  # of the entries that sample
    logprobs: list[list[TokenLogprobs]]  # like `token_ids`; nothing at all where nobody asked
    prompt_logprobs: list[list[TokenLogprobs]]  # of the entries that want them


class Launched(Protocol):
    """A step that was launched, and what it brings."""

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""

    def take(self) -> Sampled | None:
        """Wait → what the step brings, on every shard of the last stage; None on the others."""


@dataclass(frozen=True)
class Done:
    """A step that has ended; see Launched."""

    result: Sampled | None

    def is_ready(self) -> bool:
        """It is."""
        return True

    def take(self) -> Sampled | None:
        """At once."""
        return self.result


class Runner:
    """One rank's computer. Steps are executed by one thread, in the order of the channel."""

    spare_blocks = 0  # of the cache, that no sequence owns

    def __init__(self, plan: Plan, rank: int, groups: Groups, device: torch.device) -> None:
        self.plan = plan
        self.shard = plan.shards[rank]
        self.device = device
        self.dtype: torch.dtype = getattr(torch, plan.spec.dtype)
        self.is_first_stage = plan.topology.is_first_stage(rank)
        self.model: StageModel | None = None
        self.cache: KVCache | None = None
        self.join(groups)

    def join(self, groups: Groups) -> None:
        """Take the neighbours of a new epoch: rows and sends of the old one are forgotten, weights and cache stay."""
        self.groups = groups
        self.clock = PhaseClock()
        self.sampler = Sampler(groups.stage, self.shard.vocab_rows, self.plan.spec.vocab_size)
        self.logprobs = LogprobReader(groups.stage, self.shard.vocab_rows, self.plan.spec.vocab_size)
        self._receiver = self._sender = None
        if self.plan.scheduler.depth > 1 and groups.feedback is not None:
            self._receiver = FeedbackReceiver(groups.feedback, self.device) if self.is_first_stage else None
            self._sender = None if self.is_first_stage else FeedbackSender(groups.feedback)
        self.table = SequenceTable(
            self.plan.num_blocks_for_longest,
            self.plan.block_size,
            self._visibility(),
            knows_samples=self._receiver is not None or groups.next is None,
        )
        self._sendings: dict[int, tuple[Sending, torch.Tensor]] = {}  # by lane
        if self.model is not None:
            self.model.join(groups.stage)

    def part(self) -> None:
        """Let go of what belongs to the neighbours of the epoch that has ended. Raises when the device does not answer.

        An error of a GPU stays with its process: whatever is asked of it next fails too.
        """
        self._sendings.clear()
        self._receiver = self._sender = None
        torch.ones(1, device=self.device).sum().item()

    @torch.inference_mode()
    def check_weights(self) -> None:
        """Read all weights. Raises FloatingPointError when one is not finite."""
        if self.model is not None and not self.model.is_finite():
            raise FloatingPointError("weights are not finite any more")

    def _visibility(self) -> VisibilityMaker:
        specs, block_size = [attention.spec for attention in self.shard.attentions], self.plan.block_size
        has_dot = all(
            dot_attention.suits(self.dtype, self.device, block_size, spec.key_dim, spec.value_dim) for spec in specs
        )
        mask_specs, longest = frozenset(spec.mask_spec for spec in specs), dot_attention.LONGEST if has_dot else 0
        return VisibilityMaker(block_size, mask_specs, self.dtype, self.device, longest)

    def load(self, folder: Path, progress: Progress | None = None) -> LoadReport:
        """Build this rank's model and read its weights. Raises ValueError, UnsupportedModel or CheckpointError."""
        self.model = build(self.plan, self.shard.rank, folder, self.groups.stage, self.device)
        report = load_weights(self.model.sources, self.model.tensors(), progress)
        self.model.prepare()
        return report

    def num_blocks_that_fit(self, share: float, ranks_on_node: int) -> int:
        """Blocks that a share of the free memory holds; ranks on one node divide its main memory among them."""
        free = available_bytes(self.device)
        if self.device.type == "cpu":
            free //= ranks_on_node
        return int(free * share) // self.plan.kv_bytes_per_block(self.shard.rank) - self.spare_blocks

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache. Raises ValueError when not even one full-length sequence would fit."""
        self.plan.check_num_blocks(num_blocks)
        assert self.model is not None, "load comes first"
        num_all = num_blocks + self.spare_blocks
        self.cache = KVCache(self.shard.attentions, num_all, self.plan.block_size, self.dtype, self.device)
        self.model.attach(self.cache)

    def warm_up(self) -> None:
        """Run a short prompt and one token after it: all ranks at once, so that nothing is done first in a request."""
        sampling = SamplingParams(temperature=1.0, seed=0)
        num_ids = min(self.plan.block_size, self.plan.max_model_len - 1)
        num_blocks = num_blocks_for(num_ids + 1, self.plan.block_size)
        prefill = Entry(_WARM_UP_SEQ, 0, [0] * num_ids, list(range(num_blocks)), sample=True)
        decode = Entry(_WARM_UP_SEQ, num_ids, [0], [], sample=True)
        opened = [NewSequence(_WARM_UP_SEQ, sampling, [])]
        self.execute(StepBatch(epoch=0, step=-2, lane=0, opened=opened, closed=[], entries=[prefill]))
        self.execute(StepBatch(epoch=0, step=-1, lane=0, opened=[], closed=[], entries=[decode]))
        self.execute(StepBatch(epoch=0, step=-1, lane=0, opened=[], closed=[_WARM_UP_SEQ], entries=[]))
        self.clock = PhaseClock()  # what came before is no step

    def launch(self, step: StepBatch) -> Launched:
        """Start one step; on CPU it has ended by then."""
        return Done(self.execute(step))

    @torch.inference_mode()
    def execute(self, step: StepBatch) -> Sampled | None:
        """Run one step → what it brings, on every shard of the last stage; None on the others."""
        assert self.model is not None, "load comes first"
        self._begin(step)
        if not step.entries:
            return Sampled([], [], []) if self.groups.next is None else None
        tensors = self.table.tensors(step)
        output = self.forward(tensors)
        if self.groups.next is None:
            sampled = self._sample(step, tensors, output)
            self.clock.lap("sample")
            return sampled
        self._send(self.groups.next, step.lane, output)
        self.clock.lap("send")
        if self._receiver is not None:
            self._receiver.expect(step, tensors.sampled)
        return None

    def _begin(self, step: StepBatch) -> None:
        """Take in what a step changes: ids that come back, rows, and blocks that must be clean."""
        assert self.cache is not None, "allocate_cache comes first"
        for feedback in (self._receiver, self._sender):
            if feedback is not None:
                feedback.before(step)
                self.clock.lap("receive")
        fresh_blocks = self.table.apply(step)
        if fresh_blocks:
            self.cache.clear(to_device(torch.tensor(fresh_blocks), self.device))

    def _sample(self, step: StepBatch, tensors: StepTensors, logits_QV: torch.Tensor) -> Sampled:
        """SamplingRow, remember what was drawn, and read the log-probabilities that were asked for."""
        num_sampled = len(tensors.sampled)
        sampled_ids_R, ids_R = self._draw(step, logits_QV[:num_sampled], tensors.draws)
        ids: list[int] = sampled_ids_R.tolist()
        for row, token_id in zip(tensors.sampled, ids, strict=True):
            row.ids.append(max(0, token_id))
        return Sampled(
            [[token_id] for token_id in ids],
            self._sampled_logprobs(tensors.sampled, logits_QV, ids_R),
            self._prompt_logprobs(tensors, logits_QV[num_sampled:]),
        )

    def _draw(
        self, step: StepBatch, logits_RV: torch.Tensor, draws: SamplingBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ ids [R] to tell, and to go on with: what is no number has no id, but may be in the next step already."""
        sampled_ids_R = self.sampler.sample(logits_RV, draws)
        ids_R = sampled_ids_R.clamp(min=0)
        if self._sender is not None:
            self._sender.send(step, ids_R)
        return sampled_ids_R, ids_R

    def _sampled_logprobs(
        self, sampled: tuple[Row, ...], logits_QV: torch.Tensor, ids_R: torch.Tensor
    ) -> list[list[TokenLogprobs]]:
        asked = {i: row.sampling.logprobs for i, row in enumerate(sampled) if row.sampling.logprobs is not None}
        if not asked:
            return []
        rows_L = to_device(torch.tensor(list(asked)), self.device)
        told = self.logprobs.read(logits_QV[rows_L], ids_R[rows_L], list(asked.values()))
        by_row = dict(zip(asked, told, strict=True))
        return [[by_row[i]] if i in by_row else [] for i in range(len(sampled))]

    def _prompt_logprobs(self, tensors: StepTensors, logits_LV: torch.Tensor) -> list[list[TokenLogprobs]]:
        ids = [token_id for chunk in tensors.prompts for token_id in chunk.ids]
        num_top = [chunk.num_top for chunk in tensors.prompts for _ in chunk.ids]
        ids_L = to_device(torch.tensor(ids, dtype=torch.int64), self.device)
        told = iter(self.logprobs.read(logits_LV, ids_L, num_top))
        return [list(islice(told, len(chunk.ids))) for chunk in tensors.prompts]

    def forward(self, tensors: StepTensors) -> torch.Tensor:
        """Receive and compute: hidden states [tokens, hidden]; on the last stage logits [Q, vocabulary here]."""
        assert self.model is not None
        state = None
        if self.groups.previous is not None:
            shape = (tensors.ids_T.shape[0], *self.plan.spec.state_shape)
            state = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.clock.lap("compute")
            self.groups.previous.receive(state)
            self.clock.lap("receive")
        model = self.model
        output = model.forward(tensors.ids_T, tensors.positions_T, tensors.logits_rows_Q, tensors.attention, state)
        self.clock.within("exchange", model.take_exchange_s())
        self.clock.lap("compute")
        return output

    def _send(self, link: Link, lane: int, hidden_TH: torch.Tensor) -> None:
        """Start a send; its buffer is kept until the same lane sends again."""
        if lane in self._sendings:
            self._sendings.pop(lane)[0].wait()
        hidden_TH = hidden_TH.contiguous()
        self._sendings[lane] = (link.send(hidden_TH), hidden_TH)
