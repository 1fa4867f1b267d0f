"""The backend in plain torch: it is right on every device, and others override what they do faster."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch

from actors.decisions.model.plan import DEFAULT_BLOCK_SIZE, Plan
from actors.decisions.model.spec import AttentionSpec
from actors.tensors.attention import reference
from actors.tensors.attention.metadata import AttentionMetadata, LayerCache, StepLayout
from actors.tensors.attention.metadata_builder import AttentionMetadataBuilder
from actors.tensors.backend import (
    AttentionBackend,
    Download,
    GraphRunner,
    LinearMethod,
    RankModel,
)
from actors.tensors.backends.host_memory import available_bytes, growth_during
from actors.tensors.sampled_ids import SampledIds
from actors.tensors.sampling.gumbel import gumbel_argmax
from actors.words.messages import Substitution

_SHARE_OF_RANKS = 0.85  # of the main memory that is available
_TOKENS_WARM, _TOKENS_RUN = 32, 256  # at most, in the step before the one that is measured, and in that one


class ReferenceAttention:
    """Attention in plain torch; see AttentionBackend."""

    def __init__(self, builder: AttentionMetadataBuilder) -> None:
        self._builder = builder
        self.substitutions: list[Substitution] = []

    @property
    def reads_unwritten(self) -> bool:
        """True: whole blocks are read."""
        return True

    def choose_kernels(self) -> None:
        """See AttentionBackend; there are none to choose from."""

    def plan(self, layout: StepLayout) -> AttentionMetadata:
        """See AttentionBackend."""
        return self._builder.build(layout)

    def write(self, cache: LayerCache, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata) -> None:
        """See AttentionBackend."""
        reference.write(cache, key, value, metadata.slots_T)

    def attend(
        self,
        cache: LayerCache,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        return reference.attend(cache, query, metadata, scaling, sinks)


class FinishedDownload:
    """A tensor that is on the host already; see Download."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def is_ready(self) -> bool:
        """True: there is nothing to wait for."""
        return True

    def take(self) -> torch.Tensor:
        """The tensor on the host."""
        return self._tensor


class ReferenceBackend:
    """Plain torch on any device; see Backend for what its methods promise."""

    placed_on: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    default_block_size: ClassVar[int] = DEFAULT_BLOCK_SIZE
    num_padding_blocks: ClassVar[int] = 0
    runs_ahead: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def set_up(self) -> None:
        """Use one thread: ranks run in parallel already, and more threads would compete for the cores."""
        torch.set_num_threads(1)

    def free_bytes(self, ranks_on_node: int) -> int:
        """Most of the available main memory, divided among the ranks of the node; other programs get the rest."""
        return int(available_bytes() * _SHARE_OF_RANKS) // ranks_on_node

    def peak_bytes(self, run: Callable[[int], None], num_tokens: int, num_captured: int) -> int:
        """See Backend. A step of many tokens takes long on a CPU: a shorter one is run, and what it takes scaled up."""
        num_run = min(num_tokens, _TOKENS_RUN)
        run(min(num_tokens, _TOKENS_WARM))  # kernels are compiled and loaded
        return growth_during(lambda: run(num_run)) * num_tokens // num_run

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        return host.to(self.device)

    def download(self, tensor: torch.Tensor) -> Download:
        """See Backend. It waits for the tensor."""
        return FinishedDownload(tensor.cpu())

    def linear_method(self, weights: Sequence[torch.Tensor]) -> LinearMethod | None:
        """None: `torch.nn.functional.linear`."""
        return None

    def attention(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        """Attention in plain torch."""
        mask_specs = frozenset(spec.mask_spec for spec in specs)
        return ReferenceAttention(AttentionMetadataBuilder(block_size, mask_specs, dtype, self.upload))

    def optimize(self, model: RankModel) -> list[Substitution]:
        """No substitutions."""
        return []

    def best_tokens(
        self, logits_RV: torch.Tensor, first_id: int, temperatures_R1: torch.Tensor | None, keys_R1: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Backend."""
        return gumbel_argmax(logits_RV, first_id, temperatures_R1, keys_R1)

    def forbid_tokens(
        self, logits_RV: torch.Tensor, rows: Sequence[int], allowed_GB: torch.Tensor, first_bit: int
    ) -> None:
        """See Backend."""
        bits_8 = torch.arange(8, dtype=torch.uint8, device=self.device)
        allowed_GV = (self.upload(allowed_GB).unsqueeze(2) >> bits_8 & 1).flatten(1)
        self.forbid(logits_RV, rows, allowed_GV[:, first_bit : first_bit + logits_RV.shape[1]] == 0)

    def forbid(self, logits_RV: torch.Tensor, rows: Sequence[int], forbidden_GV: torch.Tensor) -> None:
        """Set logits to -inf, in place, where `forbidden_GV` (bool) says so; its rows are some of the R."""
        if len(rows) == len(logits_RV):
            logits_RV.masked_fill_(forbidden_GV, float("-inf"))
            return
        rows_G = self.upload(torch.tensor(rows))
        logits_RV.index_copy_(0, rows_G, logits_RV.index_select(0, rows_G).masked_fill_(forbidden_GV, float("-inf")))

    def lowest_kept(
        self,
        scores_UV: torch.Tensor,
        best_U1: torch.Tensor,
        is_known_U1: torch.Tensor,
        top_k_U1: torch.Tensor,
        top_p_U1: torch.Tensor,
    ) -> torch.Tensor | None:
        """None: no kernel."""
        return None

    def graph_runner(
        self, model: RankModel, plan: Plan, padding_blocks: range, sampled_ids: SampledIds
    ) -> GraphRunner | None:
        """None: all steps are alike."""
        return None
