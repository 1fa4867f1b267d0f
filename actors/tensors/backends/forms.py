"""The forms of a model's own modules that kernels can stand for: norms, gated MLPs, attention blocks as Llama's."""

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from actors.tensors.backends.trial_steps import TrialSteps
from actors.tensors.model.linear import MergedColwise, merged_of
from actors.tensors.model.parallel_layers import ColwiseRMSNorm
from actors.tensors.model.rotary import ROTARY_NAME

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def why_no_norm(norm: Any) -> str | None:
    """Why a kernel cannot compute a root-mean-square norm of a model; None: it can be tried."""
    is_wide = isinstance(norm, ColwiseRMSNorm) and norm.group.size > 1
    return "its mean is taken over the heads of all shards" if is_wide else None


class OneLayer(NamedTuple):
    """A product that the checkpoint has as one layer already, in place of a MergedColwise."""

    layer: nn.Module
    sizes: list[int]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[*, in] → [*, outputs of all parts, one after the other]."""
        result: torch.Tensor = self.layer(x)
        return result


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module has the parts of a gated MLP."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj"))


def is_merged_gated_mlp(module: nn.Module) -> bool:
    """Whether a module has the parts of a gated MLP whose first two layers are one in the checkpoint."""
    return {name for name, child in module.named_children() if list(child.parameters())} == {
        "gate_up_proj",
        "down_proj",
    }


def gate_and_up(mlp: Any) -> MergedColwise | str:
    """The merged product of a gated MLP's first two layers, or why there is none."""
    merged = merged_of([mlp.gate_proj, mlp.up_proj])
    return merged if merged is not None and len(set(merged.sizes)) == 1 else "gate and up are not multiplied as one"


def queries_keys_values(block: Any, trial: TrialSteps) -> MergedColwise | str:
    """The merged product of an attention block of Llama's form, or why the block has another form."""
    spec, angles = trial.shard.spec, trial.angles
    if any(not isinstance(getattr(block, name, None), nn.Module) for name in (*_PROJECTIONS, "o_proj")):
        return f"it has no {', '.join(_PROJECTIONS)} and o_proj"
    product = attention_product(block, trial)
    if isinstance(product, str):
        return product
    if spec.has_sinks:
        return "it has sinks"
    if angles is None or spec.key_dim != angles.dim or angles.dim % 2:
        return "its heads are not rotated whole"
    assert isinstance(product, MergedColwise), "it has three projections"
    return product


def attention_product(block: Any, trial: TrialSteps) -> MergedColwise | OneLayer | str:
    """The product of queries, keys and values of an attention block, or why there is none."""
    spec, shard = trial.shard.spec, trial.shard
    if not isinstance(getattr(block, "o_proj", None), nn.Module):
        return "it has no o_proj"
    sizes = [count * spec.key_dim for count in (shard.num_heads, shard.num_kv_heads, shard.num_kv_heads)]
    product: MergedColwise | OneLayer | None
    if isinstance(getattr(block, "qkv_proj", None), nn.Module):
        product = OneLayer(block.qkv_proj, sizes)
    elif all(isinstance(getattr(block, name, None), nn.Module) for name in _PROJECTIONS):
        product = merged_of([getattr(block, name) for name in _PROJECTIONS])
    else:
        return f"it has no {', '.join(_PROJECTIONS)}, nor qkv_proj"
    if product is None:
        return "its projections are not multiplied as one"
    if not isinstance(getattr(block, "scaling", None), float) or getattr(block, "head_dim", None) != spec.key_dim:
        return "it does not say its scaling and head_dim"
    if spec.key_dim != spec.value_dim or product.sizes != sizes:
        return "its projections give more than queries, keys and values"
    return product


def uses_rotary(module: nn.Module) -> bool:
    """Whether a module's own forward rotates by the function that its model's file defines."""
    forward = type(module).forward
    return isinstance(forward, FunctionType) and ROTARY_NAME in forward.__code__.co_names
