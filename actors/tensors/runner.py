"""The Runner: everything a rank computes, from loading its weights to the ids of a step. No Ray in it."""

import logging
from pathlib import Path
from typing import Protocol

import torch

from actors.decisions.plan import Plan
from actors.tensors.batch import SequenceTable, StepTensors
from actors.tensors.checkpoint import LoadReport, Progress, load_weights
from actors.tensors.kv_cache import KVCache, available_bytes
from actors.tensors.model import StageModel, build
from actors.tensors.sampler import Sampler
from actors.tensors.visibility import VisibilityMaker
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives import Link, Sending, StageGroup

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


class Runner:
    """One rank's computer. Steps are executed by one thread, in the order of the channel."""

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
        self.sampler = Sampler(groups.stage, self.shard.vocab_rows)
        first, end = self.shard.layers
        windows = frozenset(layer.window for layer in self.plan.spec.layers[first:end])
        visibility = VisibilityMaker(self.plan.block_size, windows, self.dtype, self.device)
        self.table = SequenceTable(self.plan.num_blocks_for_longest, self.plan.block_size, visibility)
        self._sendings: dict[int, tuple[Sending, torch.Tensor]] = {}  # by lane
        if self.model is not None:
            self.model.join(groups.stage)

    def load(self, folder: Path, progress: Progress | None = None) -> LoadReport:
        """Build this rank's model and read its weights. Raises ValueError, UnsupportedModel or CheckpointError."""
        self.model = build(self.plan.spec, self.shard, folder, self.groups.stage, self.device, self.is_first_stage)
        parameters = self.model.parameters()
        report = load_weights(folder, self.plan.spec, self.shard, parameters, self.model.ignorable_keys, progress)
        self.model.prepare()
        return report

    def num_blocks_that_fit(self, share: float, ranks_on_node: int) -> int:
        """Blocks that a share of the free memory holds; ranks on one node divide its main memory among them."""
        free = available_bytes(self.device)
        if self.device.type == "cpu":
            free //= ranks_on_node
        return int(free * share) // self.plan.kv_bytes_per_block(self.shard.rank)

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache. Raises ValueError when not even one full-length sequence would fit."""
        needed = self.plan.num_blocks_for_longest
        if num_blocks < needed:
            raise ValueError(
                f"cache.num_blocks: {num_blocks} blocks of {self.plan.block_size} tokens do not hold one sequence of "
                f"model.max_model_len {self.plan.max_model_len}; it takes {needed}. Give it more memory or shorten it"
            )
        assert self.model is not None, "load comes first"
        spec = self.plan.spec
        self.cache = KVCache(
            num_layers=self.shard.num_layers,
            num_blocks=num_blocks,
            block_size=self.plan.block_size,
            num_kv_heads=self.shard.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self.model.attach(self.cache)

    def warm_up(self) -> None:
        """Run a short prompt and one token after it: all ranks at once, so that nothing is done first in a request."""
        sampling = SamplingParams(temperature=1.0, seed=0)
        num_ids = min(self.plan.block_size, self.plan.max_model_len - 1)
        num_blocks = -(-(num_ids + 1) // self.plan.block_size)
        prefill = Entry(_WARM_UP_SEQ, 0, [0] * num_ids, list(range(num_blocks)), sample=True)
        decode = Entry(_WARM_UP_SEQ, num_ids, [0], [], sample=True)
        opened = [NewSequence(_WARM_UP_SEQ, sampling, [])]
        self.execute(StepBatch(epoch=0, step=0, lane=0, opened=opened, closed=[], entries=[prefill]))
        self.execute(StepBatch(epoch=0, step=0, lane=0, opened=[], closed=[], entries=[decode]))
        self.execute(StepBatch(epoch=0, step=0, lane=0, opened=[], closed=[_WARM_UP_SEQ], entries=[]))

    @torch.inference_mode()
    def execute(self, step: StepBatch) -> list[list[int]] | None:
        """Run one step. On every shard of the last stage: the ids of each sampling entry, in entry order; else None."""
        assert self.model is not None, "load comes first"
        assert self.cache is not None, "allocate_cache comes first"
        fresh_blocks = self.table.apply(step)
        if fresh_blocks:
            self.cache.clear(torch.tensor(fresh_blocks).to(self.device, non_blocking=True))
        if not step.entries:
            return [] if self.groups.next is None else None
        tensors = self.table.tensors(step)
        output = self.forward(tensors)
        if self.groups.next is not None:
            self._send(self.groups.next, step.lane, output)
            return None
        ids: list[int] = self.sampler.sample(output, tensors.draws).tolist()
        self.table.append_sampled(tensors.sampled_seqs, ids)
        return [[token_id] for token_id in ids]

    def forward(self, tensors: StepTensors) -> torch.Tensor:
        """Receive and compute: hidden states [tokens, hidden]; on the last stage logits [rows, vocabulary here]."""
        assert self.model is not None
        state = None
        if self.groups.previous is not None:
            shape = (tensors.ids_T.shape[0], self.plan.spec.hidden_size)
            state = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.groups.previous.receive(state)
        return self.model.forward(tensors.ids_T, tensors.positions_T, tensors.sampled_rows_R, tensors.attention, state)

    def _send(self, link: Link, lane: int, hidden_TH: torch.Tensor) -> None:
        """Start a send; its buffer is kept until the same lane sends again."""
        if lane in self._sendings:
            self._sendings.pop(lane)[0].wait()
        hidden_TH = hidden_TH.contiguous()
        self._sendings[lane] = (link.send(hidden_TH), hidden_TH)
