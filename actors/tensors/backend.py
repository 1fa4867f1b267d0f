"""The contract between a model and the device that it runs on: callers ask a backend for things, never which one it is.

T tokens of the step · Q logits rows · R rows, a token each · H hidden size · V vocabulary rows of this shard.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import nn

from actors.decisions.model.plan import Plan
from actors.decisions.model.shard_plan import ShardPlan
from actors.decisions.model.spec import AttentionSpec, ModelSpec
from actors.decisions.schedule.buckets import Buckets
from actors.tensors.attention.metadata import AttentionMetadata, Chunk, LayerCache, StepLayout
from actors.tensors.sampled_ids import SampledIds
from actors.words.messages import Bucket, Substitution
from cluster.collectives.interface import PresentGroup, StageGroup

Upload = Callable[[torch.Tensor], torch.Tensor]  # see Backend.upload


class Download(Protocol):
    """A tensor on its way to the host."""

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""

    def take(self) -> torch.Tensor:
        """Wait for this one alone → the tensor on the host."""


class LinearMethod(Protocol):
    """How one linear layer multiplies. It holds the weight in the form that its kernel reads."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out], plus the bias [out] if one is given. The caller may write to the result."""

    def is_finite(self) -> bool:
        """Whether every number of the weight is finite."""


class AttentionBackend(Protocol):
    """How the attentions of a rank are computed over the paged cache."""

    substitutions: list[Substitution]  # which kernels compute them, and why not all

    @property
    def reads_unwritten(self) -> bool:
        """Whether slots behind a sequence's keys are read, with weight 0: a block is then zeroed for its next owner."""

    def choose_kernels(self) -> None:
        """Try the kernels on this device, and use those that give the right numbers; once, before the first step."""

    def plan(self, layout: StepLayout) -> AttentionMetadata:
        """Build the attention metadata of a step, once for all layers."""

    def write(self, cache: LayerCache, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata) -> None:
        """Write key and value [KV heads, T, dimension] of the step's tokens into the cache."""

    def attend(
        self,
        cache: LayerCache,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [heads, T, dimension] over the cache, which holds the step's keys → [T, heads, value dimension].

        `sinks` [heads]: a further logit in each head's softmax, which takes weight and gives no value.
        """


class RankModel(Protocol):
    """What a backend may use of one rank's model; see model.stage_model.StageModel."""

    spec: ModelSpec
    shard: ShardPlan
    module: nn.Module  # Transformers' own, pruned to the stage and cut to the shard
    group: PresentGroup  # through which its layers exchange
    attention: AttentionBackend

    def forward(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        rows_Q: torch.Tensor,
        metadata: AttentionMetadata,
        state_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        """→ hidden states [T, H] for the next stage, or on the last stage the logits [Q, V] of the rows `rows_Q`."""


class StaleBlocks(NamedTuple):
    """Blocks of one sequence that the device does not know yet."""

    table_row: int
    first: int  # columns [first, end) of its block table
    end: int


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step that runs over static buffers, on the host."""

    ids: "array[int]"  # of every token, or UNKNOWN_ID
    chunks: list[Chunk]  # one a sequence, in token order
    logits_rows: list[int]  # indices of the tokens whose logits are needed, in the order of the result
    tables: torch.Tensor  # int64 [rows of the sequence table, blocks of a row]
    stale: list[StaleBlocks]  # of these tables


class GraphRunner(Protocol):
    """Runs steps of few fixed shapes over static buffers, so that a graph can hold them; nothing waits for the device.

    A step is filled in, then run. Steps of a shape that is not captured run over the same buffers, kernel by kernel.
    """

    buckets: Buckets  # the shapes

    @property
    def can_capture(self) -> bool:
        """Whether the device has graphs."""

    def fill(self, bucket: Bucket, inputs: StepInputs) -> None:
        """Copy a step's inputs into the buffers of a shape that holds it, without waiting for the device."""

    def state(self, num_tokens: int) -> torch.Tensor:
        """The buffer [num_tokens, H] that receives the hidden states of the stage before; not on the first stage."""

    def run(self) -> torch.Tensor:
        """Run the step that was filled in last; the next one overwrites the result.

        → hidden states [*, H] of the shape's tokens, or on the last stage logits [*, V]: those of the step come first.
        """

    def capture(self, bucket: Bucket, group: StageGroup) -> str | None:
        """Capture one shape, while no step runs; all shards call it at the same time → None, or why it failed."""

    def release(self) -> None:
        """Drop all graphs: they hold the group of the epoch, which ends."""


class Backend(Protocol):
    """What one kind of device does for a rank. Its class is called with the torch device that the rank was given."""

    placed_on: ClassVar[Literal["cpu", "cuda"]]  # what Ray gives a rank: a share of the CPUs, or a GPU
    default_block_size: ClassVar[int]  # tokens in a block of the KV cache, where the config names none
    num_padding_blocks: ClassVar[int]  # blocks of the cache that no sequence owns, for tokens of padding
    runs_ahead: ClassVar[bool]  # its device computes while the host goes on; so a step reads no tensor on the host
    device: torch.device

    def set_up(self) -> None:
        """Set up the process, once and before anything else: number of threads, the current device."""

    def free_bytes(self, ranks_on_node: int) -> int:
        """Bytes of the device that a rank may still take; ranks of one node may have to share them."""

    def peak_bytes(self, run: Callable[[int], None], num_tokens: int, num_captured: int) -> int:
        """The most bytes of the device that are taken at a time beside weights and KV cache, with graphs if there are.

        `run(n)` runs a step of n tokens, and all ranks of a gang must run it the same times; `num_tokens` are those of
        the largest step, `num_captured` those of the largest that a graph may hold.
        """

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """Copy a tensor from the host to the device, without waiting for the device."""

    def download(self, tensor: torch.Tensor) -> Download:
        """Start to copy a tensor from the device to the host."""

    def linear_method(self, weights: Sequence[torch.Tensor]) -> LinearMethod | None:
        """The method for linear layers with the same input, by their weights [out, in]; it concatenates their outputs.

        The method keeps what it needs of the weights, and the layers drop them. None: the backend has nothing better
        than `torch.nn.functional.linear` by each layer's own weight.
        """

    def attention(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        """The AttentionBackend for a rank's attentions; `specs` count this shard's heads."""

    def optimize(self, model: RankModel) -> list[Substitution]:
        """Substitute modules of the model by faster ones of this backend. The weights are loaded already.

        Each substitute was tried on random numbers, on this device, against what it stands for.
        """

    def best_tokens(
        self, logits_RV: torch.Tensor, first_id: int, temperatures_R1: torch.Tensor | None, keys_R1: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The Gumbel arg-max of each row: scores (float32) and ids (int64) [R]; see sampling.gumbel.gumbel_argmax."""

    def forbid_tokens(
        self, logits_RV: torch.Tensor, rows: Sequence[int], allowed_GB: torch.Tensor, first_bit: int
    ) -> None:
        """Set logits to -inf, in place, in G of the R rows; without waiting for the device.

        `allowed_GB` (uint8, on the host) has a bit for each token: bit i % 8 of byte i // 8, those of this shard from
        `first_bit` on. 1: the logit stays.
        """

    def lowest_kept(
        self,
        scores_UV: torch.Tensor,
        best_U1: torch.Tensor,
        is_known_U1: torch.Tensor,
        top_k_U1: torch.Tensor,
        top_p_U1: torch.Tensor,
    ) -> torch.Tensor | None:
        """What top_k and top_p keep of a vocabulary that is here whole, by a kernel; None: there is no kernel.

        As sampling.vocabulary_search.Vocabulary.lowest_kept; where it is known already, anything.
        """

    def graph_runner(
        self, model: RankModel, plan: Plan, padding_blocks: range, sampled_ids: SampledIds
    ) -> GraphRunner | None:
        """What runs small steps over static buffers, once the cache is allocated; None: they run like large ones.

        `padding_blocks` are those of the cache that no sequence owns.
        """
