"""Paged attention on CUDA: torch's kernel where it agrees with the reference, else gathers of whole block tables.

T tokens of the step · S sequences of the step, O = S + 1 offsets · N blocks of a table · h heads · H KV heads ·
D dimension of a key or a value.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.decisions.schedule.blocks import num_blocks_for
from actors.tensors.attention import reference
from actors.tensors.attention.metadata import AttentionMetadata, LayerCache, PagedRows, StepLayout
from actors.tensors.attention.metadata_builder import AttentionMetadataBuilder
from actors.tensors.backend import Upload
from actors.tensors.backends.cuda.varlen_support import KernelDevice, why_no_kernel
from actors.tensors.backends.reference import ReferenceAttention
from actors.tensors.backends.trial import Account
from actors.words.messages import Substitution

logger = logging.getLogger(__name__)


class PagedKernel(Protocol):
    """Computes one attention of a step through block tables."""

    def attend(
        self,
        cache: LayerCache,
        query_ThD: torch.Tensor,
        rows: PagedRows,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [T, heads, D] over the cache, which holds the step's own keys already → [T, heads, value D]."""


class VarlenKernel:
    """torch.nn.attention.varlen.varlen_attn: FlashAttention over block tables. CUDA only."""

    def __init__(self, mask_spec: MaskSpec, implementation: str | None) -> None:
        self._left = -1 if mask_spec.window is None else mask_spec.window - 1  # tokens before its own that a token sees
        self._takes_first_keys = implementation is None  # FlashAttention 3 refuses them beside block tables

    def attend(
        self,
        cache: LayerCache,
        query_ThD: torch.Tensor,
        rows: PagedRows,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [T, heads, D] over the cache, which holds the step's own keys already → [T, heads, value D]."""
        from torch.nn.attention.varlen import varlen_attn

        assert sinks is None, "why_no_kernel refuses sinks"
        # The last token sees all keys: without a window argument the kernel has a faster path for grouped queries
        sees_all = rows.max_queries == 1 and self._left == -1
        out_ThD = varlen_attn(
            query_ThD,
            cache.keys_NbHD,
            cache.values_NbHD,
            rows.first_tokens_O,
            rows.first_keys_O if self._takes_first_keys else None,
            rows.max_queries,
            rows.max_keys,
            scale=scaling,
            window_size=(-1, -1) if sees_all else (self._left, 0),
            enable_gqa=query_ThD.shape[1] != cache.keys_NbHD.shape[2],
            seqused_k=rows.lengths_S,
            block_table=rows.tables_SN,
        )
        assert isinstance(out_ThD, torch.Tensor)
        return out_ThD


class CUDAAttention(ReferenceAttention):
    """See AttentionBackend. Without a kernel, rows gather whole block tables in the decoder and beside kernels."""

    def __init__(
        self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int, device: torch.device, upload: Upload
    ) -> None:
        self.block_size = block_size
        self._upload = upload
        self.kernels, substitutions = choose_kernels(specs, dtype, block_size, device)
        # Masks are built only for attentions that no kernel computes
        masks = frozenset(spec.mask_spec for spec in specs if spec.name not in self.kernels)
        super().__init__(AttentionMetadataBuilder(block_size, masks, dtype, upload))
        self.substitutions = substitutions

    def plan(self, layout: StepLayout) -> AttentionMetadata:
        """See AttentionBackend; kernels need only the step's block tables."""
        metadata = super().plan(layout)
        if not self.kernels:
            return metadata
        chunks = layout.chunks
        max_keys = max(chunk.end for chunk in chunks)
        num_blocks = num_blocks_for(max_keys, self.block_size)
        counts_S = torch.tensor([chunk.num_tokens for chunk in chunks])
        on_host = (
            layout.tables[[chunk.table for chunk in chunks], :num_blocks],
            torch.tensor([chunk.end for chunk in chunks]),
            torch.nn.functional.pad(counts_S.cumsum(0), (1, 0)),
            torch.arange(len(chunks) + 1) * max_keys,
        )
        tables_SN, lengths_S, first_tokens_O, first_keys_O = (self._upload(x.int()) for x in on_host)
        rows = PagedRows(tables_SN, lengths_S, first_tokens_O, first_keys_O, int(counts_S.max()), max_keys)
        return AttentionMetadata(metadata.slots_T, metadata.by_mask, paged=rows)

    def attend(
        self,
        cache: LayerCache,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        kernel = self.kernels.get(cache.spec.name)
        if metadata.paged is not None and kernel is not None:
            return kernel.attend(cache, query.transpose(0, 1), metadata.paged, scaling, sinks)
        if metadata.paged is not None and metadata.paged.max_queries == 1:
            return reference.attend_whole_tables(cache, query.transpose(0, 1), metadata.paged, scaling, sinks)
        return reference.attend(cache, query, metadata, scaling, sinks)


def kernel_device(device: torch.device) -> KernelDevice:
    """The facts about a device on which the choice of a kernel depends."""
    if device.type != "cuda":
        return KernelDevice(device.type)
    from torch.nn.attention import current_flash_attention_impl

    major, minor = torch.cuda.get_device_capability(device)
    return KernelDevice("cuda", 10 * major + minor, current_flash_attention_impl())


def choose_kernels(
    specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int, device: torch.device
) -> tuple[dict[str, PagedKernel], list[Substitution]]:
    """The kernels of the attentions that torch's kernel computes, by name, and why it does not compute the others."""
    where, account, chosen = kernel_device(device), Account(), dict[str, PagedKernel]()
    faults: dict[tuple[MaskSpec, int, int, int], str | None] = {}
    for spec in specs:
        kernel = VarlenKernel(spec.mask_spec, where.implementation)
        reason = why_no_kernel(spec, str(dtype).removeprefix("torch."), block_size, where)
        if reason is None:
            kind = (spec.mask_spec, spec.num_heads, spec.num_kv_heads, spec.key_dim)
            if kind not in faults:
                faults[kind] = kernel_fault(kernel, spec, dtype, block_size, device)
            reason = faults[kind]
        if account.put("varlen_attention", reason):
            chosen[spec.name] = kernel
    return chosen, account.entries()


def kernel_fault(
    kernel: PagedKernel, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device
) -> str | None:
    """What is wrong with a kernel on this device, by random sequences of one and of several tokens; None: nothing."""
    generator = torch.Generator().manual_seed(0)
    groups = spec.num_heads // spec.num_kv_heads
    num_heads, num_kv_heads = (groups, 1) if groups > 1 else (2, 2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    keys, values = (random(6, block_size, num_kv_heads, spec.key_dim) for _ in range(2))
    cache, exact = LayerCache(spec, keys, values), LayerCache(spec, keys.float(), values.float())
    lengths = [1, block_size + 3, 2 * block_size]
    tables_SN = torch.tensor([[4, 0], [1, 5], [2, 3]], dtype=torch.int32, device=device)
    scaling = spec.key_dim**-0.5
    for num_queries in (1, 3):
        counts = [min(num_queries, length) for length in lengths]
        query_ThD = random(sum(counts), num_heads, spec.key_dim)
        # The same tokens as single-token rows, each with its own length
        own = [(seq, lengths[seq] - count + 1 + i) for seq, count in enumerate(counts) for i in range(count)]
        rows = PagedRows.decode(tables_SN[[seq for seq, _ in own]], _int32([end for _, end in own], device), block_size)
        expected = reference.attend_whole_tables(exact, query_ThD.float(), rows, scaling)
        first_tokens_O = _int32([0, *torch.tensor(counts).cumsum(0).tolist()], device)
        first_keys_O = _int32([i * 2 * block_size for i in range(len(lengths) + 1)], device)
        packed = PagedRows(
            tables_SN, _int32(lengths, device), first_tokens_O, first_keys_O, num_queries, 2 * block_size
        )
        try:
            out = kernel.attend(cache, query_ThD, packed, scaling).float()
        except Exception as error:  # noqa: BLE001 - another torch may not even know the arguments
            return f"it fails on this device: {error}"
        difference = (out - expected).abs().max().item()
        if not difference < 0.03:  # two roundings of bfloat16 at values around 1; NaN fails too
            return f"it differs by {difference:g} from the reference on this device"
    return None


def _int32(numbers: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
