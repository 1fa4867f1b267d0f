"""Attention blocks of Llama's form on CPU in four calls: product, rotation and cache write, attention, output.

T tokens of the step · h heads · D their dimension.
"""

from typing import Any

import torch
from torch import nn

from actors.tensors.backends.cpu.kernels import DTYPE_TAGS, CosSin, Heads, KeysValues, rotate_and_store
from actors.tensors.backends.forms import queries_keys_values
from actors.tensors.backends.trial import Reason
from actors.tensors.backends.trial_steps import TrialSteps
from actors.tensors.model.attention_layer import attention_of
from actors.tensors.model.linear import MergedColwise


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
    merged = queries_keys_values(module, trial)
    if isinstance(merged, str):
        return merged
    if trial.dtype not in DTYPE_TAGS:
        return f"kernels compute in bfloat16 and float32, not in {trial.dtype}"
    module.merged = merged
    with trial.attached_to(module):
        reason = trial.difference(module, KernelAttention.forward)
    if reason is None:
        module.__class__ = KernelAttention
    return reason
