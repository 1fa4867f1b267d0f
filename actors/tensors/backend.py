"""The contract between a model and the device that it runs on: a backend is asked for things, never who it is.

T tokens of the step · R rows, a token each · V vocabulary rows of this shard.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import nn

from actors.decisions.model.plan import Plan
from actors.decisions.model.shard_plan import ShardPlan
from actors.decisions.model.spec import AttentionSpec, ModelSpec
from actors.tensors.attention.metadata import AttentionMetadata, LayerCache, StepLayout
from actors.words.messages import Substitution
from cluster.collectives.interface import PresentGroup, StageGroup

Upload = Callable[[torch.Tensor], torch.Tensor]  # see Backend.upload


class Download(Protocol):
    """A tensor on its way to the host."""

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""

    def take(self) -> torch.Tensor:
        """Wait for this one alone → the tensor on the host."""


class LinearMethod(Protocol):
    """How one product multiplies. It holds the weight in whatever form it reads it."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out], plus the bias [out] if one is given. The result is the caller's to write to."""

    def is_finite(self) -> bool:
        """Whether every number of the weight is finite."""


class AttentionBackend(Protocol):
    """How the attentions of a rank are computed over the paged cache."""

    def plan(self, layout: StepLayout) -> AttentionMetadata:
        """Once a step: what every layer's attention must know of it."""

    def write(self, cache: LayerCache, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata) -> None:
        """Put key and value [KV heads, T, dimension] of the step's tokens into the cache."""

    def attend(
        self,
        cache: LayerCache,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [heads, T, dimension] over the cache, which has the step's keys already → [T, heads, value dimension].

        `sinks` [heads]: a logit beside the keys' that takes weight and gives no value.
        """


class RankModel(Protocol):
    """What a backend may use of the model of one rank; see model.stage_model.StageModel."""

    spec: ModelSpec
    shard: ShardPlan
    module: nn.Module  # Transformers' own, pruned to the stage and cut to the shard
    group: PresentGroup  # that its layers exchange through
    attention: AttentionBackend

    def forward(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        rows_Q: torch.Tensor,
        metadata: AttentionMetadata,
        state_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        """→ hidden states [T, H] for the next stage, or on the last stage the logits [Q, V] of the rows asked for."""


LAST_ID = -1  # in place of an id: what this row sampled last, which only the device knows as yet


@dataclass(frozen=True)
class DecodeRows:
    """What a decode step asks for, on the host: one token a row."""

    ids: list[int]  # or LAST_ID
    positions: list[int]
    table_rows: list[int]  # of the sequence table
    tables: torch.Tensor  # int64 [rows of the sequence table, blocks of a row]


class Decoder(Protocol):
    """Runs steps of one token a row over buffers of fixed shape, so that the host waits for nothing."""

    def takes(self, num_rows: int, last_position: int) -> bool:
        """Whether there is a shape for a step of so many rows, none of them beyond a position."""

    def fill(self, rows: DecodeRows) -> None:
        """Put a step into the buffers of its shape, without waiting for the device."""

    def state(self, num_rows: int) -> torch.Tensor:
        """Where the hidden states of the stage before are to be received; not on the first stage."""

    def run(self) -> torch.Tensor:
        """Run the step that was filled in last → hidden states or logits, one row each."""

    def remember(self, table_rows: Sequence[int], ids_R: torch.Tensor) -> None:
        """What rows of the sequence table sampled last, int64 on the device: LAST_ID stands for it from now on."""

    def capture(self, group: StageGroup) -> None:
        """Prepare every shape for the group of this epoch; all shards call it at once."""

    def release(self) -> None:
        """Let go of what belongs to the group of the epoch that has ended."""


class Backend(Protocol):
    """One device. It is constructed with the torch device that a rank was given."""

    placed_on: ClassVar[Literal["cpu", "cuda"]]  # what Ray gives a rank: a share of the CPUs, or a GPU
    default_block_size: ClassVar[int]  # tokens in a block of the KV cache, where the config names none
    num_padding_blocks: ClassVar[int]  # blocks of the cache that no sequence owns, for rows of padding
    device: torch.device

    def set_up(self) -> None:
        """Once a process, before anything else: threads, the current device."""

    def free_bytes(self, ranks_on_node: int) -> int:
        """Memory that a rank may still take for the KV cache; ranks of one node may have to share it."""

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the device, without waiting for it."""

    def download(self, tensor: torch.Tensor) -> Download:
        """Start to bring a tensor of the device to the host."""

    def linear_method(self, weights: Sequence[torch.Tensor]) -> LinearMethod | None:
        """How a product multiplies: weights [out, in] that get the same input, their outputs one after the other.

        The method holds what it needs of them: the layers let go of theirs. None: nothing better than
        `torch.nn.functional.linear` by each layer's own weight.
        """

    def attention(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        """What computes the attentions of a rank; `specs` have this shard's heads."""

    def optimize(self, model: RankModel) -> list[Substitution]:
        """Put what this backend does better in place of the model's own modules. The weights hold their values.

        Each substitute was tried on random numbers against what it stands for, on this device.
        """

    def best_tokens(
        self, logits_RV: torch.Tensor, first_id: int, temperatures_R1: torch.Tensor | None, keys_R1: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (float32) and ids (int64) of the best token of each row [R]; see sampling.gumbel.gumbel_argmax."""

    def decoder(self, model: RankModel, plan: Plan, padding_block: int) -> Decoder | None:
        """What runs decode steps over static buffers, once the cache is there; None: they run as all others do.

        `padding_block` is the first of the blocks that no sequence owns.
        """
