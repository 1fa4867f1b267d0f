"""Substitutes norms, gated MLPs, attention blocks and decoder layers by fewer launches, where they give the same.

With merged products a layer of Llama's form takes ten: four products, two for attention, norms with the residual added,
rotation with the cache's write, and the gate. T tokens of the step · h heads · D their dimension.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from actors.tensors.backend import RankModel
from actors.tensors.backends.cuda import layer_kernels
from actors.tensors.backends.cuda.layer_kernels import HeadNorms
from actors.tensors.backends.forms import gate_and_up, is_gated_mlp, queries_keys_values, why_no_norm
from actors.tensors.backends.trial import Account, Reason, difference, norm_difference, random
from actors.tensors.backends.trial_steps import TrialSteps
from actors.tensors.model.attention_layer import attention_of
from actors.tensors.model.linear import MergedColwise
from actors.tensors.model.parallel_layers import is_rms_norm, norm_eps

_NORMS = ("input_layernorm", "post_attention_layernorm")


class FusedNorm(nn.Module):
    """Stands for a root-mean-square norm, in one launch."""

    original: type[nn.Module]
    scale: torch.Tensor  # what it multiplies by: the weight, or one plus the weight; float32
    epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[*, n] → [*, n]. An input of another dtype than the weight's goes to the model's own code."""
        if hidden_states.dtype != self.weight.dtype:
            own: torch.Tensor = self.original.forward(self, hidden_states)
            return own
        return layer_kernels.rms_norm(hidden_states, self.scale, self.epsilon)


class FusedMLP(nn.Module):
    """Stands for a gated MLP: gate and up in one product, their gating in one launch."""

    merged: MergedColwise  # gate and up
    activation: str
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, hidden] → [*, hidden]."""
        result: torch.Tensor = self.down_proj(layer_kernels.gate(self.merged.product(x), self.activation))
        return result


class FusedAttention(nn.Module):
    """Stands for an attention block: one product, one launch up to the cache, attention, one product."""

    merged: MergedColwise  # queries, keys and values
    norms: HeadNorms | None
    o_proj: nn.Module
    head_dim: int
    scaling: float

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden], and cos and sin [1, T, D] → [1, T, hidden], and None for the attention weights."""
        layer, (cos, sin), num_tokens = attention_of(self), position_embeddings, hidden_states.shape[1]
        assert cos.shape == sin.shape == (1, num_tokens, self.head_dim), "other angles than the probe saw"
        product = self.merged.product(hidden_states)
        num_heads = self.merged.sizes[0] // self.head_dim
        query_hTD = layer_kernels.rotate_and_store(
            product, cos, sin, self.norms, layer.current.metadata.slots_T, layer.cache, num_heads
        )
        out_ThD = layer.attend_stored(query_hTD, self.scaling)
        return self.o_proj(out_ThD.view(1, num_tokens, -1)), None


class _Handover:
    """Hidden states on their way into a layer, with the norm that it begins with, if the layer before computed it."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm
        self._hidden: torch.Tensor | None = None
        self._normed: torch.Tensor | None = None

    def add(self, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Their sum, of which `norm` knows the norm then."""
        self._hidden, self._normed = _add_norm(residual, out, self._norm)
        return self._hidden

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm of a layer's input. It is computed here if something else came than what was added last."""
        known, normed, self._hidden, self._normed = self._hidden, self._normed, None, None
        if hidden is not known or normed is None:
            normed = self._norm(hidden)
        assert isinstance(normed, torch.Tensor)
        return normed


class FusedLayer(nn.Module):
    """Stands for a decoder layer: each residual is added in the launch that computes the norm behind it."""

    original: type[nn.Module]
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    entry: _Handover
    exit: _Handover | None  # the entry of the layer behind, if that is a FusedLayer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, T, hidden] → [1, T, hidden]. With more arguments by position it is the model's own code that runs."""
        if args:
            return self.original.forward(self, hidden_states, *args, **kwargs)
        attended = self.self_attn(hidden_states=self.entry.norm(hidden_states), **kwargs)[0]
        hidden_states, normed = _add_norm(hidden_states, attended, self.post_attention_layernorm)
        out = self.mlp(normed)
        return hidden_states + out if self.exit is None else self.exit.add(hidden_states, out)


def _add_norm(x: torch.Tensor, y: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer_kernels.add_rms_norm(x, y, norm.scale, norm.epsilon)


@torch.inference_mode()
def substitute(model: RankModel, block_size: int, device: torch.device, account: Account) -> None:
    """Substitute a model's norms, gated MLPs, attention blocks and decoder layers; shards try by themselves."""
    for module in list(model.module.modules()):
        if is_rms_norm(module):
            account.put("rms_norm", _substitute_norm(module))
        elif is_gated_mlp(module):
            account.put("gated_mlp", _substitute_mlp(module, model, device))
    for shard in model.shard.attentions:
        trial = TrialSteps(model, shard, block_size, device)
        layer_name, _, name = shard.spec.name.rpartition(".")
        attention, layer = model.module.get_submodule(shard.spec.name), model.module.get_submodule(layer_name)
        with trial.attached_to(attention):
            account.put("attention_block", _substitute_attention(attention, trial))
            account.put("decoder_layer", _substitute_layer(layer, name, trial))
    layers: list[Any] = [
        model.module.get_submodule(f"{model.spec.layers_name}.{layer}") for layer in range(*model.shard.layers)
    ]
    for layer, following in pairwise(layers):
        if isinstance(layer, FusedLayer) and isinstance(following, FusedLayer):
            layer.exit = following.entry


def _substitute_norm(module: Any) -> Reason | None:
    if (unfit := why_no_norm(module)) is not None:
        return unfit
    weight, eps, reason = module.weight.float(), norm_eps(module), None
    for scale in (weight, weight + 1):
        reason = norm_difference(module, eps, partial(layer_kernels.rms_norm, weight=scale, eps=eps))
        if reason is None:
            module.original, module.scale, module.epsilon = type(module), scale, eps
            module.__class__ = FusedNorm
            return None
    return reason


def _substitute_mlp(module: Any, model: RankModel, device: torch.device) -> Reason | None:
    merged = gate_and_up(module)
    if isinstance(merged, str):
        return merged
    module.merged = merged
    x = random(1, 4, model.spec.hidden_size, dtype=getattr(torch, model.spec.dtype), device=device)
    reason: Reason | None = None
    for module.activation in layer_kernels.ACTIVATIONS:
        reason = difference(lambda: module(x), lambda: FusedMLP.forward(module, x))
        if reason is None:
            module.__class__ = FusedMLP
            break
    return reason


def _substitute_attention(module: Any, trial: TrialSteps) -> Reason | None:
    merged = queries_keys_values(module, trial)
    if isinstance(merged, str):
        return merged
    module.merged, module.norms = merged, _head_norms(module)
    reason = trial.difference(module, FusedAttention.forward)
    if reason is None:
        module.__class__ = FusedAttention
    return reason


def _head_norms(module: Any) -> HeadNorms | None:
    """The norms of an attention block over single heads; None where there are none, or others."""
    norms: list[Any] = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if any(not isinstance(norm, FusedNorm) or len(norm.scale) != module.head_dim for norm in norms):
        return None
    eps = {norm.epsilon for norm in norms}
    return HeadNorms(norms[0].scale, norms[1].scale, *eps) if len(eps) == 1 else None


def _substitute_layer(layer: Any, attention_name: str, trial: TrialSteps) -> Reason | None:
    parts = [getattr(layer, name, None) for name in ("mlp", *_NORMS)]
    if attention_name != "self_attn" or any(not isinstance(part, nn.Module) for part in parts):
        return f"it has no self_attn, mlp, {' and '.join(_NORMS)}"
    if not all(isinstance(getattr(layer, name), FusedNorm) for name in _NORMS):
        return "its norms are computed by no kernel"
    layer.entry, layer.exit = _Handover(layer.input_layernorm), None
    reason = trial.difference(layer, FusedLayer.forward)
    if reason is None:
        layer.original = type(layer)
        layer.__class__ = FusedLayer
    return reason
