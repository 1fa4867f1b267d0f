"""Attention through whole block tables, without shapes that depend on lengths: torch's paged kernel, or a gather.

T tokens of the step · S sequences in it · B rows of one token each · N blocks of a table · K = N × block size ·
H KV heads · G queries to a KV head · D dimension of a key.

`VarlenKernel` has never run on a GPU. It is used only where it agreed with `GatheredAttention` on that very device,
on random numbers, at start-up (`kernel_fault`).
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.backends.cuda.varlen_support import KernelDevice, why_no_kernel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PagedRows:
    """Where the keys of each sequence of a step lie; the tokens of one sequence stand together, in its order."""

    tables_SN: torch.Tensor  # int32; what lies behind a sequence's length is never seen, but must be a block
    lengths_S: torch.Tensor  # int32: keys of each sequence, those of this step included
    first_tokens_S1: torch.Tensor  # int32 [S + 1]: where each one's tokens begin in the step
    first_keys_S1: torch.Tensor  # int32 [S + 1]: the kernel asks for it, and reads it only without block tables
    max_queries: int  # tokens of one sequence in this step, at most
    max_keys: int

    @classmethod
    def decode(cls, tables_BN: torch.Tensor, lengths_B: torch.Tensor, block_size: int) -> "PagedRows":
        """Rows of one token each; every number that shapes a launch comes from the shapes of the tensors."""
        num_rows, num_blocks = tables_BN.shape
        rows = torch.arange(num_rows + 1, dtype=torch.int32, device=tables_BN.device)
        max_keys = num_blocks * block_size
        return cls(tables_BN, lengths_B, rows, rows * max_keys, 1, max_keys)


class PagedAttention(Protocol):
    """Computes one attention of a step through block tables."""

    def takes(self, rows: PagedRows) -> bool:
        """Whether it can: not every one has an answer for more than one token a sequence."""

    def attend(
        self,
        query_THD: torch.Tensor,
        keys_NbHD: torch.Tensor,
        values_NbHD: torch.Tensor,
        rows: PagedRows,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Query [T, heads, D] and the cache, which has the step's own keys already → [T, heads, value D]."""


class VarlenKernel:
    """torch.nn.attention.varlen.varlen_attn: FlashAttention over block tables. CUDA only."""

    def __init__(self, mask_spec: MaskSpec, implementation: str | None) -> None:
        self._left = -1 if mask_spec.window is None else mask_spec.window - 1  # tokens before its own that a token sees
        self._takes_first_keys = implementation is None  # FlashAttention 3 refuses them beside block tables

    def takes(self, rows: PagedRows) -> bool:
        """Always."""
        return True

    def attend(
        self,
        query_THD: torch.Tensor,
        keys_NbHD: torch.Tensor,
        values_NbHD: torch.Tensor,
        rows: PagedRows,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See PagedAttention."""
        from torch.nn.attention.varlen import varlen_attn

        assert sinks is None, "why_no_kernel lets no sinks through"
        # A last token sees all keys: without a window its kernel has a faster form for grouped queries
        sees_all = rows.max_queries == 1 and self._left == -1
        out_THD = varlen_attn(
            query_THD,
            keys_NbHD,
            values_NbHD,
            rows.first_tokens_S1,
            rows.first_keys_S1 if self._takes_first_keys else None,
            rows.max_queries,
            rows.max_keys,
            scale=scaling,
            window_size=(-1, -1) if sees_all else (self._left, 0),
            enable_gqa=query_THD.shape[1] != keys_NbHD.shape[2],
            seqused_k=rows.lengths_S,
            block_table=rows.tables_SN,
        )
        assert isinstance(out_THD, torch.Tensor)
        return out_THD


class GatheredAttention:
    """Written out for rows of one token: any dtype, dimension, mask_spec, soft cap and sinks, on any device.

    It reads and copies whole tables, whatever the lengths: the shapes are the tables', so that a graph can hold it.
    """

    def __init__(self, mask_spec: MaskSpec, softcap: float | None) -> None:
        self._sight = mask_spec
        self._softcap = softcap

    def takes(self, rows: PagedRows) -> bool:
        """Rows of one token."""
        return rows.max_queries == 1

    def attend(
        self,
        query_THD: torch.Tensor,
        keys_NbHD: torch.Tensor,
        values_NbHD: torch.Tensor,
        rows: PagedRows,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See PagedAttention."""
        block_size, num_kv_heads = keys_NbHD.shape[1:3]
        positions_B1 = rows.lengths_S.long().unsqueeze(1) - 1
        blocks_N = torch.arange(rows.tables_SN.shape[1], device=query_THD.device)
        # Nothing of another sequence enters a row's attention, masked or not: behind its end it sees its own last block
        own_BN = rows.tables_SN.long().gather(1, blocks_N.minimum(positions_B1 // block_size))
        query_BHGD = query_THD.reshape(len(query_THD), num_kv_heads, -1, query_THD.shape[2])
        logits_BHGK = (query_BHGD @ _gather(keys_NbHD, own_BN).transpose(-1, -2)).float() * scaling
        if self._softcap is not None:
            logits_BHGK = torch.tanh(logits_BHGK / self._softcap) * self._softcap
        keys_K = torch.arange(own_BN.shape[1] * block_size, device=query_THD.device)
        is_seen_BK = (keys_K <= positions_B1) & (keys_K >= first_keys(self._sight, positions_B1))
        logits_BHGK = logits_BHGK.masked_fill(~is_seen_BK[:, None, None, :], float("-inf"))
        if sinks is not None:
            beside = sinks.float().view(num_kv_heads, -1, 1).expand(*logits_BHGK.shape[:-1], 1)
            logits_BHGK = torch.cat([logits_BHGK, beside], dim=-1)
        weights_BHGK = logits_BHGK.softmax(-1)[..., : len(keys_K)].to(query_THD.dtype)
        out_BHGD = weights_BHGK @ _gather(values_NbHD, own_BN)
        return out_BHGD.flatten(1, 2)


def _gather(cache_NbHD: torch.Tensor, tables_BN: torch.Tensor) -> torch.Tensor:
    """What lies in the blocks of each row [B, H, K, D]."""
    return cache_NbHD[tables_BN].flatten(1, 2).transpose(1, 2)


def first_keys(mask_spec: MaskSpec, positions: torch.Tensor) -> torch.Tensor:
    """`MaskSpec.first_key` of many positions, int64 [*]."""
    first = torch.zeros_like(positions)
    if mask_spec.window is not None:
        first = (positions - mask_spec.window + 1).clamp_(min=0)
    return first if mask_spec.chunk is None else first.maximum(positions // mask_spec.chunk * mask_spec.chunk)


def kernel_device(device: torch.device) -> KernelDevice:
    """What the choice of a kernel must know about a device."""
    if device.type != "cuda":
        return KernelDevice(device.type)
    from torch.nn.attention import current_flash_attention_impl

    major, minor = torch.cuda.get_device_capability(device)
    return KernelDevice("cuda", 10 * major + minor, current_flash_attention_impl())


def choose_kernels(
    specs: list[AttentionSpec], dtype: torch.dtype, block_size: int, device: torch.device
) -> dict[str, VarlenKernel]:
    """The attentions, by name, that torch's kernel computes; why others are not among them is logged, once a reason."""
    where, chosen, reasons = kernel_device(device), {}, dict[str, int]()
    faults: dict[tuple[MaskSpec, int, int, int], str | None] = {}
    for spec in specs:
        kernel = VarlenKernel(spec.mask_spec, where.implementation)
        reason = why_no_kernel(spec, str(dtype).removeprefix("torch."), block_size, where)
        if reason is None:
            kind = (spec.mask_spec, spec.num_heads, spec.num_kv_heads, spec.key_dim)
            if kind not in faults:
                faults[kind] = kernel_fault(kernel, spec, dtype, block_size, device)
            reason = faults[kind]
        if reason is None:
            chosen[spec.name] = kernel
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    for reason, number in reasons.items():
        logger.info("%d of %d attentions run without torch's paged kernel: %s", number, len(specs), reason)
    return chosen


def kernel_fault(
    kernel: PagedAttention, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device
) -> str | None:
    """What is wrong with a kernel on this device, seen on random rows of one and of several tokens; None: nothing."""
    generator = torch.Generator().manual_seed(0)
    groups = spec.num_heads // spec.num_kv_heads
    num_heads, num_kv_heads = (groups, 1) if groups > 1 else (2, 2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    keys, values = (random(6, block_size, num_kv_heads, spec.key_dim) for _ in range(2))
    lengths = [1, block_size + 3, 2 * block_size]
    tables_SN = torch.tensor([[4, 0], [1, 5], [2, 3]], dtype=torch.int32, device=device)
    written_out = GatheredAttention(spec.mask_spec, None)
    scaling = spec.key_dim**-0.5
    for num_queries in (1, 3):
        counts = [min(num_queries, length) for length in lengths]
        query_THD = random(sum(counts), num_heads, spec.key_dim)
        # The same tokens as rows of their own: each sees what lies before it
        own = [(seq, lengths[seq] - count + 1 + i) for seq, count in enumerate(counts) for i in range(count)]
        rows = PagedRows.decode(tables_SN[[seq for seq, _ in own]], _int32([end for _, end in own], device), block_size)
        expected = written_out.attend(query_THD.float(), keys.float(), values.float(), rows, scaling, None)
        first_tokens = _int32([0, *torch.tensor(counts).cumsum(0).tolist()], device)
        first_keys_S1 = _int32([i * 2 * block_size for i in range(len(lengths) + 1)], device)
        packed = PagedRows(tables_SN, _int32(lengths, device), first_tokens, first_keys_S1, num_queries, 2 * block_size)
        try:
            out = kernel.attend(query_THD, keys, values, packed, scaling, None).float()
        except (RuntimeError, ValueError) as error:
            return f"it fails on this device: {error}"
        difference = (out - expected).abs().max().item()
        if not difference < 0.03:  # two roundings of bfloat16 at values around 1; NaN fails too
            return f"it differs by {difference:g} from attention written out on this device"
    return None


def _int32(numbers: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
