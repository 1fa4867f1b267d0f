"""Paged attention on CUDA: Triton kernels where they agree with the reference, else gathers of whole block tables.

T tokens of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from actors.decisions.model.spec import AttentionSpec
from actors.decisions.schedule.blocks import num_blocks_for
from actors.tensors.attention import reference
from actors.tensors.attention.metadata import AttentionMetadata, LayerCache, PagedRows, StepLayout
from actors.tensors.attention.metadata_builder import AttentionMetadataBuilder
from actors.tensors.backend import Upload
from actors.tensors.backends.cuda.attention_trial import try_kernel
from actors.tensors.backends.reference import ReferenceAttention
from actors.tensors.backends.trial import Account, Deviation, Reason

if TYPE_CHECKING:
    from actors.tensors.backends.cuda.paged_attention import PagedAttention, Work


@dataclass(frozen=True)
class CUDAMetadata(AttentionMetadata):
    """What kernels need to know beside the block tables, and what attention without a kernel reads in their place."""

    work: "dict[PagedAttention, Work]" = field(default_factory=dict)
    gathered: PagedRows | None = None  # every token as a row of its own, whose whole block table is gathered


class CUDAAttention(ReferenceAttention):
    """See AttentionBackend. Without a kernel, static steps, and rows beside kernels, gather whole block tables."""

    def __init__(
        self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int, device: torch.device, upload: Upload
    ) -> None:
        self.block_size = block_size
        self.kernels: dict[str, PagedAttention] = {}  # by attention
        self._specs, self._dtype, self._device, self._upload = specs, dtype, device, upload
        super().__init__(self._make_builder())

    def choose_kernels(self) -> None:
        """See AttentionBackend."""
        account = Account()
        tried: dict[AttentionSpec, PagedAttention | Reason] = {}
        for spec in self._specs:
            kind = replace(spec, name="")
            if kind not in tried:
                tried[kind] = try_kernel(kind, self._dtype, self.block_size, self._device)
            found = tried[kind]
            if isinstance(found, str | Deviation):
                account.put("paged_attention", found)
            else:
                account.put("paged_attention", None)
                self.kernels[spec.name] = found
        self.substitutions = account.entries()
        self._builder = self._make_builder()

    def _make_builder(self) -> AttentionMetadataBuilder:
        """Masks are built only for attentions that no kernel computes."""
        masks = frozenset(spec.mask_spec for spec in self._specs if spec.name not in self.kernels)
        return AttentionMetadataBuilder(self.block_size, masks, self._dtype, self._upload)

    def plan(self, layout: StepLayout) -> AttentionMetadata:
        """See AttentionBackend; kernels need only the step's block tables."""
        metadata = super().plan(layout)
        if not self.kernels:
            return metadata
        chunks = layout.chunks
        max_keys = max(chunk.end for chunk in chunks)
        num_tokens = [chunk.num_tokens for chunk in chunks]
        on_host = (
            layout.tables[[chunk.table for chunk in chunks], : num_blocks_for(max_keys, self.block_size)],
            torch.tensor([chunk.end for chunk in chunks]),
            torch.tensor([0, *num_tokens]).cumsum(0),
        )
        tables_SN, lengths_S, first_tokens_O = (self._upload(tensor.int()) for tensor in on_host)
        rows = PagedRows(
            tables_SN,
            lengths_S,
            first_tokens_O,
            max_tokens=sum(num_tokens),
            max_single=num_tokens.count(1),
            max_queries=max(num_tokens),
            max_keys=max_keys,
        )
        gathered = rows if rows.max_queries == 1 else None
        return CUDAMetadata(metadata.slots_T, metadata.by_mask, paged=rows, work=self._work(rows), gathered=gathered)

    @property
    def gathers(self) -> bool:
        """Whether some attention has no kernel."""
        return any(spec.name not in self.kernels for spec in self._specs)

    @property
    def reads_unwritten(self) -> bool:
        """Kernels read a sequence's own keys only."""
        return self.gathers

    def plan_rows(self, slots_T: torch.Tensor, positions_T: torch.Tensor, rows: PagedRows) -> AttentionMetadata:
        """The metadata of a step over static buffers, from tensors on the device alone."""
        gathered = None
        if self.gathers:
            gathered = rows if rows.max_queries == 1 else self._by_token(positions_T, rows)
        return CUDAMetadata(slots_T, {}, paged=rows, work=self._work(rows), gathered=gathered)

    def _by_token(self, positions_T: torch.Tensor, rows: PagedRows) -> PagedRows:
        tokens_T = torch.arange(len(positions_T), dtype=torch.int32, device=positions_T.device)
        seq_of_T = torch.searchsorted(rows.first_tokens_O[1:].contiguous(), tokens_T, right=True)
        return PagedRows.decode(rows.tables_SN.index_select(0, seq_of_T), (positions_T + 1).int(), self.block_size)

    def _work(self, rows: PagedRows) -> "dict[PagedAttention, Work]":
        return {kernel: kernel.plan(rows) for kernel in dict.fromkeys(self.kernels.values())}

    def attend(
        self,
        cache: LayerCache,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        if isinstance(metadata, CUDAMetadata):
            kernel, rows = self.kernels.get(cache.spec.name), metadata.paged
            if rows is not None and kernel is not None:
                return kernel.attend(cache, query, rows, metadata.work[kernel], scaling, sinks)
            if metadata.gathered is not None:
                return reference.attend_whole_tables(cache, query.transpose(0, 1), metadata.gathered, scaling, sinks)
        return reference.attend(cache, query, metadata, scaling, sinks)
