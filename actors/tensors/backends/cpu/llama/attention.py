"""Attention blocks of Llama's form on CPU in four calls: product, rotation and cache write, attention, output.

T tokens of the step · h heads · D their dimension.
"""

from typing import Any

import torch
from torch import nn

from actors.tensors.backends.cpu.kernels import DTYPE_TAGS, CosSin, Heads, KeysValues, rotate_and_store
from actors.tensors.backends.trial import Reason, difference
from actors.tensors.backends.trial_steps import TrialSteps
from actors.tensors.model.attention_layer import attention_of
from actors.tensors.model.linear import MergedColwise, merged_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class KernelAttention(nn.Module):
    """Stands for an attention block whose q, k and v projections are merged into one product."""

    merged: MergedColwise  # queries, keys and values
    o_proj: nn.Module
    head_dim: int
    scaling: float

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden], and cos and sin [1, T, D] → [1, T, hidden], and None for the attention weights."""
        layer = attention_of(self)
        cos, sin = position_embeddings
        num_tokens, size = hidden_states.shape[1], self.head_dim
        assert cos.dtype == hidden_states.dtype and cos.shape == (1, num_tokens, size), (
            "other angles than the probe saw"
        )
        product = self.merged.product(hidden_states)
        cos, sin, keys, values = cos.contiguous(), sin.contiguous(), layer.cache.keys_NbHD, layer.cache.values_NbHD
        num_kv_heads = keys.shape[2]
        num_heads = product.shape[2] // size - 2 * num_kv_heads
        query_ThD = product.new_empty(num_tokens, num_heads, size)
        rotate_and_store(
            product.data_ptr(),
            CosSin(cos.data_ptr(), sin.data_ptr()),
            query_ThD.data_ptr(),
            KeysValues(keys.data_ptr(), values.data_ptr()),
            layer.current.metadata.slots_T.numpy(),
            Heads(num_heads, num_kv_heads, size),
            DTYPE_TAGS[product.dtype],
        )
        out_ThD = layer.attend_stored(query_ThD.transpose(0, 1), self.scaling)
        return self.o_proj(out_ThD.view(1, num_tokens, -1)), None


def substitute(module: Any, trial: TrialSteps) -> Reason | None:
    """Turn an attention module into a KernelAttention, in place; returns why not, or None if it is one now."""
    if (unfit := _why_not(module, trial)) is not None:
        return unfit
    module.merged = merged_of([getattr(module, name) for name in PROJECTIONS])
    with trial.attached_to(module):
        reason = difference(
            lambda: trial.run(module),
            lambda: trial.run(module, KernelAttention.forward),
            lambda: trial.run(module, is_nudged=True),
        )
    if reason is None:
        module.__class__ = KernelAttention
    return reason


def _why_not(module: Any, trial: TrialSteps) -> str | None:
    spec, angles = trial.shard.spec, trial.angles
    if any(not isinstance(getattr(module, name, None), nn.Module) for name in (*PROJECTIONS, "o_proj")):
        return f"it has no {', '.join(PROJECTIONS)} and o_proj"
    merged = merged_of([getattr(module, name) for name in PROJECTIONS])
    if merged is None:
        return "its projections are not multiplied as one"
    if trial.dtype not in DTYPE_TAGS:
        return f"kernels compute in bfloat16 and float32, not in {trial.dtype}"
    if spec.has_sinks:
        return "it has sinks"
    if not isinstance(getattr(module, "scaling", None), float) or getattr(module, "head_dim", None) != spec.key_dim:
        return "it does not say its scaling and head_dim"
    if angles is None or not spec.key_dim == spec.value_dim == angles.dim:
        return "its heads are not rotated whole"
    if sum(merged.sizes) != (trial.shard.num_heads + 2 * trial.shard.num_kv_heads) * spec.key_dim:
        return "its projections give more than queries, keys and values"
    return None
