"""Llama's attention on CPU in four calls: one product, one pass that rotates and fills the cache, attention, output."""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from actors.tensors.attention.layer import MODULE_ATTRIBUTE, LayerAttention
from actors.tensors.backends.cpu import kernels
from actors.tensors.model.parallel_layers import ColwiseLinear

# All three do the same; the window that two of them name is in the attention's mask_spec.
KNOWN = (LlamaAttention, MistralAttention, Qwen2Attention)


class KernelAttention(nn.Module):
    """Stands for one of KNOWN whose projections are siblings, in the order of queries, keys and values."""

    siblings: Any  # see fusions.MergedColwise
    o_proj: nn.Module
    head_dim: int
    scaling: float
    original: type[nn.Module]

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden] and cos and sin [1, T, D] → [1, T, hidden], and no weights."""
        layer = getattr(self, MODULE_ATTRIBUTE)
        assert isinstance(layer, LayerAttention)
        step = layer.current.attention
        assert step is not None, "no step is set"
        cos, sin = position_embeddings
        dtype, num_tokens, size = hidden_states.dtype, hidden_states.shape[1], self.head_dim
        if not cos.dtype == dtype == layer.keys_SHD.dtype or cos.shape != (1, num_tokens, size):
            done: tuple[torch.Tensor, None] = self.original.forward(
                self, hidden_states, position_embeddings=position_embeddings, **kwargs
            )
            return done
        product = self.siblings.product(hidden_states)
        num_kv_heads = layer.keys_SHD.shape[1]
        num_heads = product.shape[2] // size - 2 * num_kv_heads
        query_ThD = product.new_empty(num_tokens, num_heads, size)
        kernels.rotate_and_store(
            product.data_ptr(),
            cos.contiguous().data_ptr(),
            sin.contiguous().data_ptr(),
            query_ThD.data_ptr(),
            layer.keys_SHD.data_ptr(),
            layer.values_SHD.data_ptr(),
            step.slots_T.numpy(),
            (num_heads, num_kv_heads, size),
            kernels.DTYPE_TAGS[dtype],
        )
        out_ThD = layer.attend_stored(query_ThD.transpose(0, 1), self.scaling)
        return self.o_proj(out_ThD.view(1, num_tokens, -1)), None


def fuse_attention(module: Any, siblings: Any) -> bool:
    """Make it one, where its projections are `siblings` and nothing else is; False where not."""
    names = ("q_proj", "k_proj", "v_proj")
    layers: list[ColwiseLinear] = siblings.layers
    if [getattr(module, name) for name in names] != layers or layers[0].weight.dtype not in kernels.DTYPE_TAGS:
        return False
    module.siblings, module.original = siblings, type(module)
    module.__class__ = KernelAttention
    return True
