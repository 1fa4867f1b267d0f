"""Substitutes norms, gated MLPs, attention blocks and decoder layers by fewer launches, where they give the same.

With merged products a layer of Llama's form takes ten: four products, two for attention, norms with the residual added,
rotation with the cache's write, and the gate. T tokens of the step · h heads · D their dimension.
"""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from actors.tensors.backend import RankModel
from actors.tensors.backends.cuda import layer_kernels, rotary_kernels
from actors.tensors.backends.cuda.layer_kernels import Norm
from actors.tensors.backends.cuda.rotary_kernels import HeadNorms, Rotation, rotations
from actors.tensors.backends.forms import (
    OneLayer,
    attention_product,
    gate_and_up,
    is_gated_mlp,
    is_merged_gated_mlp,
    why_no_norm,
)
from actors.tensors.backends.trial import Account, Reason, closest_norm, difference, random
from actors.tensors.backends.trial_steps import TrialSteps
from actors.tensors.model.attention_layer import attention_of
from actors.tensors.model.linear import MergedColwise
from actors.tensors.model.parallel_layers import is_rms_norm, norm_eps


class FusedNorm(nn.Module):
    """Stands for a root-mean-square norm, in one launch."""

    original: type[nn.Module]
    norm: Norm  # its weight is what it multiplies by: the model's, or one plus the model's; float32

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[*, n] → [*, n]. An input of another dtype than the weight's goes to the model's own code."""
        if hidden_states.dtype != self.weight.dtype:
            own: torch.Tensor = self.original.forward(self, hidden_states)
            return own
        return layer_kernels.rms_norm(hidden_states, self.norm)


class FusedMLP(nn.Module):
    """Stands for a gated MLP: gate and up in one product, their gating in one launch."""

    merged: MergedColwise | OneLayer  # gate and up
    activation: str
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, hidden] → [*, hidden]."""
        result: torch.Tensor = self.down_proj(layer_kernels.gate(self.merged.product(x), self.activation))
        return result


class FusedAttention(nn.Module):
    """Stands for an attention block: one product, one launch up to the cache, attention, one product."""

    merged: MergedColwise | OneLayer  # queries, keys and values
    norms: HeadNorms | None
    rotation: Rotation
    angle_dim: int
    has_sinks: bool
    sinks: torch.Tensor  # [heads], if it has them
    o_proj: nn.Module
    head_dim: int
    scaling: float

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, T, hidden], and cos and sin [1, T, angles] → [1, T, hidden], and None for the attention weights."""
        layer, (cos, sin), num_tokens = attention_of(self), position_embeddings, hidden_states.shape[1]
        assert cos.shape == sin.shape == (1, num_tokens, self.angle_dim), "other angles than the probe saw"
        product = self.merged.product(hidden_states)
        num_heads = self.merged.sizes[0] // self.head_dim
        query_hTD = rotary_kernels.rotate_and_store(
            product, cos, sin, self.rotation, self.norms, layer.current.metadata.slots_T, layer.cache, num_heads
        )
        out_ThD = layer.attend_stored(query_hTD, self.scaling, self.sinks if self.has_sinks else None)
        return self.o_proj(out_ThD.view(1, num_tokens, -1)), None


class LayerNorms(NamedTuple):
    """The norms of a layer, by name: before and behind its attention and its MLP."""

    before_attention: str | None
    behind_attention: str | None
    before_mlp: str | None
    behind_mlp: str | None

    @property
    def names(self) -> set[str]:
        """Of those that there are."""
        return {name for name in self if name is not None}


_NORMS = (
    LayerNorms("input_layernorm", None, "post_attention_layernorm", None),
    LayerNorms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),  # Gemma
    LayerNorms(
        "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
    ),  # GLM 4
    LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # OLMo 2
)


class _Handover:
    """Hidden states on their way into a layer, with the norm that it begins with, if the layer before computed it."""

    def __init__(self, norm: Any) -> None:
        """`norm`: a FusedNorm, or None where a layer begins with its attention."""
        self._norm = norm
        self._hidden: torch.Tensor | None = None
        self._normed: torch.Tensor | None = None

    def add(self, residual: torch.Tensor, out: torch.Tensor, norm_of_out: Norm | None) -> torch.Tensor:
        """Their sum, of which `norm` knows the norm then."""
        norm = None if self._norm is None else self._norm.norm
        self._hidden, self._normed = layer_kernels.add_rms_norm(residual, out, norm, norm_of_out)
        return self._hidden

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm of a layer's input. It is computed here if something else came than what was added last."""
        known, normed, self._hidden, self._normed = self._hidden, self._normed, None, None
        if hidden is not known or normed is None:
            normed = hidden if self._norm is None else self._norm(hidden)
        assert isinstance(normed, torch.Tensor)
        return normed


class FusedLayer(nn.Module):
    """Stands for a decoder layer: each residual is added in the launch that computes the norms beside it."""

    original: type[nn.Module]
    self_attn: nn.Module
    mlp: nn.Module
    entry: _Handover
    norms: tuple[Norm | None, Norm | None, Norm | None]  # behind the attention, before the MLP, behind it
    exit: _Handover | None  # the entry of the layer behind, if that is a FusedLayer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, T, hidden] → [1, T, hidden]. With more arguments by position it is the model's own code that runs."""
        if args:
            return self.original.forward(self, hidden_states, *args, **kwargs)
        behind_attention, before_mlp, behind_mlp = self.norms
        attended = self.self_attn(hidden_states=self.entry.norm(hidden_states), **kwargs)[0]
        hidden_states, normed = layer_kernels.add_rms_norm(hidden_states, attended, before_mlp, behind_attention)
        out = self.mlp(normed)
        out = out[0] if isinstance(out, tuple) else out  # experts hand out their choice, too
        if self.exit is not None:
            return self.exit.add(hidden_states, out, behind_mlp)
        if behind_mlp is None:
            return hidden_states + out
        return layer_kernels.add_rms_norm(hidden_states, out, None, behind_mlp)[0]


@torch.inference_mode()
def substitute(model: RankModel, block_size: int, device: torch.device, account: Account) -> None:
    """Substitute a model's norms, gated MLPs, attention blocks and decoder layers; shards try by themselves."""
    for module in list(model.module.modules()):
        if is_rms_norm(module):
            account.put("rms_norm", _substitute_norm(module))
        elif is_gated_mlp(module) or is_merged_gated_mlp(module):
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
    weight, eps = module.weight.float(), norm_eps(module)
    norms = [Norm(scale, eps, rounds_first) for scale in (weight, weight + 1) for rounds_first in (True, False)]
    found = closest_norm(module, eps, [partial(layer_kernels.rms_norm, norm=norm) for norm in norms])
    if not isinstance(found, int):
        return found
    module.original, module.norm = type(module), norms[found]
    module.__class__ = FusedNorm
    return None


def _substitute_mlp(module: Any, model: RankModel, device: torch.device) -> Reason | None:
    merged = gate_and_up(module) if is_gated_mlp(module) else OneLayer(module.gate_up_proj, [])
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
    merged, norms = attention_product(module, trial), _head_norms(module)
    if isinstance(merged, str):
        return merged
    if isinstance(norms, str):
        return norms
    found = [] if trial.angles is None else rotations(trial.angles.dim, module.head_dim)
    if trial.angles is None or not found:
        return "its heads are not rotated by angles that fit them"
    module.has_sinks = trial.shard.spec.has_sinks
    if module.has_sinks and not isinstance(getattr(module, "sinks", None), torch.Tensor):
        return "it does not hold its sinks"
    module.merged, module.norms, module.angle_dim = merged, norms, trial.angles.dim
    reason: Reason | None = None
    for module.rotation in found:
        deviation = trial.difference(module, FusedAttention.forward)
        if deviation is None:
            module.__class__ = FusedAttention
            return None
        reason = reason or deviation
    return reason


def _head_norms(module: Any) -> HeadNorms | str | None:
    """The norms of queries and keys, of single heads or of all together; None where there are none, or why not."""
    norms: list[Any] = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if norms == [None, None]:
        return None
    if not all(isinstance(norm, FusedNorm) for norm in norms):
        return "its norms over heads are computed by no kernel"
    (query, key) = (norm.norm for norm in norms)
    if (query.eps, query.rounds_first) != (key.eps, key.rounds_first):
        return "its norms over heads differ in more than their weights"
    return HeadNorms(query, key)


def _substitute_layer(layer: Any, attention_name: str, trial: TrialSteps) -> Reason | None:
    if attention_name != "self_attn" or not isinstance(getattr(layer, "mlp", None), nn.Module):
        return "it has no self_attn and mlp"
    names = {name for name, _ in layer.named_children() if "norm" in name}
    form = next((form for form in _NORMS if form.names == names), None)
    if form is None:
        return "its norms lie elsewhere"
    if not all(isinstance(getattr(layer, name), FusedNorm) for name in names):
        return "its norms are computed by no kernel"
    first, *others = (None if name is None else getattr(layer, name) for name in form)
    layer.entry, layer.exit = _Handover(first), None
    layer.norms = tuple(None if norm is None else norm.norm for norm in others)
    reason = trial.difference(layer, FusedLayer.forward)
    if reason is None:
        layer.original = type(layer)
        layer.__class__ = FusedLayer
    return reason
