"""Runs the small steps of a GPU over static buffers, in a CUDA graph each where it is captured.

It runs on CPU too, without graphs, where the tests compare it with plain steps.
"""

import logging
from array import array

import torch

from actors.decisions.model.plan import Plan
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.buckets import MAX_MIXED_TOKENS, Buckets
from actors.tensors.backend import RankModel, StepInputs
from actors.tensors.backends.cuda.attention import CUDAAttention
from actors.tensors.backends.cuda.graph import CapturedStep, GraphMaker, capture
from actors.tensors.backends.cuda.static_step import StaticBuffers, StaticStep
from actors.tensors.sampled_ids import SampledIds
from actors.words.messages import Bucket
from cluster.collectives.interface import StageGroup

logger = logging.getLogger(__name__)

# Where attention gathers whole block tables:
_TOKENS_GATHERED = 1024  # tokens of the smallest table
_MIXED_TOKENS = 64  # of the largest step with chunks of prompts: each of its tokens gathers a table


class CUDAGraphRunner:
    """See GraphRunner."""

    def __init__(
        self,
        model: RankModel,
        plan: Plan,
        padding_blocks: range,
        sampled_ids: SampledIds,
        device: torch.device,
        make_graph: GraphMaker | None,
    ) -> None:
        """`padding_blocks` belong to no sequence: padding writes there. Without `make_graph` nothing is captured."""
        attention = model.attention
        assert isinstance(attention, CUDAAttention), "a model attends through its device's backend"
        self._model, self._block_size, self._make_graph = model, plan.block_size, make_graph
        longest, settings = plan.num_blocks_for_longest, plan.scheduler
        if attention.gathers:
            first_blocks = min(longest, num_blocks_for(_TOKENS_GATHERED, plan.block_size))
            buckets = Buckets.of(settings, longest, _MIXED_TOKENS, first_blocks)
            measured = settings.max_num_seqs * settings.max_num_batched_tokens  # what the largest step gathers
            self.buckets = buckets.gathering_at_most(max(measured, _MIXED_TOKENS * _TOKENS_GATHERED))
        else:
            self.buckets = Buckets.of(settings, longest, MAX_MIXED_TOKENS)
        shapes, shard = self.buckets.shapes, model.shard
        most_tokens, most_seqs = max(shape.num_tokens for shape in shapes), max(shape.num_seqs for shape in shapes)
        state = None
        if not shard.has_embedding:
            dtype: torch.dtype = getattr(torch, plan.spec.dtype)
            state = torch.zeros((most_tokens, *plan.spec.state_shape), dtype=dtype, device=device)
        num_results = most_seqs if shard.has_head else most_tokens
        num_in_flight = settings.num_lanes * settings.depth
        self._buffers = StaticBuffers(shapes, num_in_flight, num_results, padding_blocks, sampled_ids, state, device)
        self._steps: dict[Bucket, StaticStep] = {}
        self.captured: dict[Bucket, CapturedStep] = {}
        self._filled: Bucket | None = None

    @property
    def can_capture(self) -> bool:
        """See GraphRunner."""
        return self._make_graph is not None

    def fill(self, bucket: Bucket, inputs: StepInputs) -> None:
        """See GraphRunner."""
        self._filled = bucket
        self._buffers.fill(bucket, inputs)

    def state(self, num_tokens: int) -> torch.Tensor:
        """See GraphRunner."""
        assert self._buffers.state_TH is not None, "the first stage receives no hidden states"
        return self._buffers.state_TH[:num_tokens]

    def run(self) -> torch.Tensor:
        """See GraphRunner."""
        assert self._filled is not None, "fill comes first"
        return (self.captured.get(self._filled) or self._step(self._filled)).run()

    def capture(self, bucket: Bucket, group: StageGroup) -> str | None:
        """See GraphRunner."""
        assert self._make_graph is not None, "this device has no graphs"
        self.fill(bucket, StepInputs(array("q"), [], [], torch.zeros(0, 0, dtype=torch.int64), []))
        self._buffers.pad_state()
        made = capture(self._step(bucket), self._make_graph, group)
        if isinstance(made, str):
            logger.warning("steps of %s go on without a graph: %s", bucket, made)
            return made
        self.captured[bucket] = made
        logger.info("captured %s, graph %d of %d", bucket, len(self.captured), len(self.buckets.shapes))
        return None

    def release(self) -> None:
        """See GraphRunner."""
        while self.captured:
            self.captured.popitem()[1].release()

    def _step(self, bucket: Bucket) -> StaticStep:
        return self._steps.get(bucket) or self._steps.setdefault(
            bucket, StaticStep(bucket, self._model, self._buffers, self._block_size)
        )
