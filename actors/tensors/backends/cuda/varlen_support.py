"""Decides whether torch's paged attention kernel can compute an attention, and says why not."""

from dataclasses import dataclass

from actors.decisions.model.spec import AttentionSpec

FA2_BLOCK_TOKENS = 256  # flash_api.cpp, mha_varlen_fwd: "Paged KV cache block size must be divisible by 256"
MAX_HEAD_DIM = 256  # the same: "only supports head dimension at most 256"
FIRST_CAPABILITY = 80  # the same: "Ampere GPUs or newer"


@dataclass(frozen=True)
class KernelDevice:
    """The device on which attention would run."""

    kind: str  # torch's device type
    capability: int = 0  # ten times the major plus the minor number of a CUDA device
    implementation: str | None = None  # of torch.nn.attention's registry; None: FlashAttention 2, which torch brings


def why_no_kernel(spec: AttentionSpec, dtype: str, block_size: int, device: KernelDevice) -> str | None:
    """Why `torch.nn.attention.varlen.varlen_attn` with a block table cannot compute an attention; None: it can.

    Its limits are read from torch 2.13's varlen.py and _fa3.py, and from flash_api.cpp of its FlashAttention 2.
    """
    if device.kind != "cuda":
        return f"it runs on CUDA, not on {device.kind}"
    if device.capability < FIRST_CAPABILITY:
        return f"it wants compute capability 8.0, and this device has {device.capability / 10:.1f}"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, not in {dtype}; see model.dtype"
    if spec.softcap is not None:
        return "it has no soft cap"
    if spec.has_sinks:
        return "it has no sinks"
    if spec.mask_spec.chunk is not None:
        return "it has no chunks"
    if spec.key_dim != spec.value_dim:
        return f"keys of dimension {spec.key_dim} and values of {spec.value_dim} differ"
    if spec.key_dim % 8 or spec.key_dim > MAX_HEAD_DIM:
        return f"head dimension {spec.key_dim} is no multiple of 8 up to {MAX_HEAD_DIM}"
    if device.implementation is None and block_size % FA2_BLOCK_TOKENS:
        return f"it wants blocks of a multiple of {FA2_BLOCK_TOKENS} tokens, not of {block_size}; set cache.block_size"
    return None
