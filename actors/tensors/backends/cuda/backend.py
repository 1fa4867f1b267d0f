"""The CUDA backend: paged attention in Triton, small steps in CUDA graphs, norms and rotations of one kernel each."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch

from actors.decisions.model.memory import GRAPH_BYTES
from actors.decisions.model.plan import Plan
from actors.decisions.model.spec import AttentionSpec
from actors.tensors.backend import AttentionBackend, Download, GraphRunner, LinearMethod, RankModel
from actors.tensors.backends.cuda import linear, module_kernels, transfer
from actors.tensors.backends.cuda.attention import CUDAAttention
from actors.tensors.backends.cuda.attention_trial import why_no_kernels
from actors.tensors.backends.cuda.graph import CUDAGraphs, GraphMaker
from actors.tensors.backends.cuda.graph_runner import CUDAGraphRunner
from actors.tensors.backends.cuda.vocabulary_search import Search, try_search
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.backends.trial import Account, exchanging_nothing
from actors.tensors.sampled_ids import SampledIds
from actors.words.messages import Substitution


class CUDABackend(ReferenceBackend):
    """See Backend. Its device may be the CPU, where the tests run the same code without graphs and kernels."""

    placed_on: ClassVar[Literal["cpu", "cuda"]] = "cuda"
    num_padding_blocks: ClassVar[int] = 32  # of 16 tokens: as many as the padding of a mixed step may have
    runs_ahead: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._search: Search | None = None

    def set_up(self) -> None:
        """Make the rank's GPU the current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            super().set_up()

    def free_bytes(self, ranks_on_node: int) -> int:
        """Free memory of the rank's own GPU, including what torch holds but does not use."""
        if self.device.type != "cuda":
            return super().free_bytes(ranks_on_node)
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def peak_bytes(self, run: Callable[[int], None], num_tokens: int, num_captured: int) -> int:
        """See Backend. The graphs share a pool, which keeps what the largest captured step takes."""
        if self.device.type != "cuda":
            return super().peak_bytes(run, num_tokens, num_captured)
        return self._reserved_by(run, num_tokens) + self._reserved_by(run, num_captured) + GRAPH_BYTES

    def _reserved_by(self, run: Callable[[int], None], num_tokens: int) -> int:
        """Bytes that the allocator takes from the device for a step, gaps included."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        run(num_tokens)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.empty_cache()
        return peak - before

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        return transfer.to_device(host, self.device)

    def download(self, tensor: torch.Tensor) -> Download:
        """See Backend."""
        return transfer.EventDownload(tensor) if tensor.is_cuda else super().download(tensor)

    def linear_method(self, weights: Sequence[torch.Tensor]) -> LinearMethod | None:
        """See Backend."""
        return linear.linear_method(weights)

    def attention(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        """See Backend."""
        return CUDAAttention(specs, dtype, block_size, self.device, self.upload)

    def optimize(self, model: RankModel) -> list[Substitution]:
        """See Backend: what takes fewer launches as a whole, and what is left of rotary embeddings."""
        account, attention = Account(), model.attention
        assert isinstance(attention, CUDAAttention), "a model attends through its device's backend"
        with exchanging_nothing(model.group):
            if why_no_kernels(self.device) is None:
                from actors.tensors.backends.cuda import layers

                layers.substitute(model, attention.block_size, self.device, account)
            elif self.device.type == "cuda":
                module_kernels.substitute_norms(model.module, account)
            if self.device.type == "cuda":
                module_kernels.substitute_rotary(model.module, account)
            if model.shard.has_head and model.group.size == 1:
                found = try_search(self.device)
                self._search = found if callable(found) else None
                account.put("vocabulary_search", None if callable(found) else found)
        return account.entries()

    def lowest_kept(
        self,
        scores_UV: torch.Tensor,
        best_U1: torch.Tensor,
        is_known_U1: torch.Tensor,
        top_k_U1: torch.Tensor,
        top_p_U1: torch.Tensor,
    ) -> torch.Tensor | None:
        """See Backend."""
        return None if self._search is None else self._search(scores_UV, best_U1, is_known_U1, top_k_U1, top_p_U1)

    def graph_runner(
        self, model: RankModel, plan: Plan, padding_blocks: range, sampled_ids: SampledIds
    ) -> GraphRunner | None:
        """See Backend."""
        return CUDAGraphRunner(model, plan, padding_blocks, sampled_ids, self.device, self.graph_maker())

    def graph_maker(self) -> GraphMaker | None:
        """What makes graphs on this device; None: it has none."""
        return CUDAGraphs() if self.device.type == "cuda" else None
