"""Tries paged attention on random sequences against the reference, and says why a device cannot have it.

T tokens of the step · S sequences · D dimension of a key.
"""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from actors.decisions.model.spec import AttentionSpec
from actors.decisions.schedule.blocks import num_blocks_for
from actors.tensors.attention import reference
from actors.tensors.attention.metadata import LayerCache, PagedRows
from actors.tensors.backends.trial import Reason, difference, random

if TYPE_CHECKING:
    from actors.tensors.backends.cuda.paged_attention import PagedAttention

_FIRST_CAPABILITY = (8, 0)  # Ampere: tensor cores for bfloat16, copies to shared memory in the background
_LENGTHS = (1, 19, 517, 300)  # keys of the sequences: within a block, and over several splits
_STEPS = ((1, 1, 1, 1), (1, 1, 40, 7))  # tokens of each sequence in a step
_SCALING = 4.0  # times the usual one: peaked weights, in which a soft cap shows
_ROWS_AT_ONCE = 8  # whose keys the reference gathers together


def why_no_kernels(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; CUDA builds of torch bring it"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _FIRST_CAPABILITY:
            wanted, found = (".".join(map(str, one)) for one in (_FIRST_CAPABILITY, capability))
            return f"it wants compute capability {wanted}, and this device has {found}"
        return None
    from actors.tensors.backends.cuda.attention_kernels import IS_INTERPRETED

    return None if IS_INTERPRETED else f"it runs on CUDA, not on {device.type}"


def try_kernel(
    spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device
) -> "PagedAttention | Reason":
    """Make the PagedAttention of an attention, and compare it with the reference → it, or why it is not used."""
    reason_not = why_no_kernels(device)
    if reason_not is not None:
        return reason_not
    from actors.tensors.backends.cuda.paged_attention import PagedAttention

    kernel = PagedAttention(spec, dtype, block_size, device)
    return why_not(kernel, spec, dtype, block_size, device) or kernel


@torch.inference_mode()
def why_not(
    kernel: "PagedAttention", spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device
) -> Reason | None:
    """Why a kernel is not used for an attention; None: it gives what the reference gives, for tokens and for chunks."""
    num_blocks = num_blocks_for(max(_LENGTHS), block_size)
    shape = len(_LENGTHS) * num_blocks, block_size, spec.num_kv_heads
    keys = random(*shape, spec.key_dim, dtype=dtype, device=device, seed=1)
    values = random(*shape, spec.value_dim, dtype=dtype, device=device, seed=2)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    tables_SN = order.view(len(_LENGTHS), num_blocks).int().to(device)
    sinks = random(spec.num_heads, dtype=dtype, device=device, seed=4) if spec.has_sinks else None
    scaling = _SCALING * spec.key_dim**-0.5
    cache, exact = LayerCache(spec, keys, values), LayerCache(spec, keys.float(), values.float())
    for counts in _STEPS:
        rows, single = _rows_of(tables_SN, counts), _single_rows(tables_SN, counts)
        query_ThD = random(sum(counts), spec.num_heads, spec.key_dim, dtype=dtype, device=device, seed=5)

        def expected(query_ThD: torch.Tensor = query_ThD, single: list[PagedRows] = single) -> torch.Tensor:
            pieces = zip(torch.split(query_ThD.float(), _ROWS_AT_ONCE), single, strict=True)
            out = [reference.attend_whole_tables(exact, query, piece, scaling, sinks) for query, piece in pieces]
            return torch.cat(out).to(dtype)

        def found(query_ThD: torch.Tensor = query_ThD, rows: PagedRows = rows) -> torch.Tensor:
            return kernel.attend(cache, query_ThD.transpose(0, 1), rows, kernel.plan(rows), scaling, sinks)

        reason_not = difference(expected, found)
        if reason_not is not None:
            return reason_not
    return None


def _int32(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _rows_of(tables_SN: torch.Tensor, counts: Sequence[int]) -> PagedRows:
    """The last tokens of each sequence, so many as `counts` says."""
    offsets = [sum(counts[:seq]) for seq in range(len(counts) + 1)]
    lengths_S, first_tokens_O = (_int32(numbers, tables_SN.device) for numbers in (_LENGTHS, offsets))
    return PagedRows(
        tables_SN,
        lengths_S,
        first_tokens_O,
        max_tokens=offsets[-1],
        max_single=counts.count(1),
        max_queries=max(counts),
        max_keys=max(_LENGTHS),
    )


def _single_rows(tables_SN: torch.Tensor, counts: Sequence[int]) -> list[PagedRows]:
    """The same tokens as rows of one token, each with its own length, a few at once."""
    tokens = [
        (seq, length - count + 1 + index)
        for seq, (length, count) in enumerate(zip(_LENGTHS, counts, strict=True))
        for index in range(count)
    ]
    pieces = [tokens[first : first + _ROWS_AT_ONCE] for first in range(0, len(tokens), _ROWS_AT_ONCE)]
    # Bounds do not matter to the reference
    return [
        PagedRows.decode(
            tables_SN[[seq for seq, _ in piece]], _int32([length for _, length in piece], tables_SN.device), 1
        )
        for piece in pieces
    ]
