"""Substitutes norms, gated MLPs and rotary embeddings by one kernel each, if it gives what the model's own gives."""

from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from actors.tensors.backends.cpu.kernels import DTYPE_TAGS, CosSin, HeadRows, Rows, rms_norm, rotate, silu_mul
from actors.tensors.backends.forms import gate_and_up, why_no_norm
from actors.tensors.backends.trial import Reason, closest_norm, difference, random
from actors.tensors.model.linear import MergedColwise
from actors.tensors.model.parallel_layers import norm_eps
from actors.tensors.model.rotary import ROTARY_NAME

_CPU = torch.device("cpu")


class KernelRMSNorm(nn.Module):
    """Stands for a root-mean-square norm, in one pass over its input."""

    weight: torch.Tensor
    original: type[nn.Module]
    rounds_first: bool  # before the weight, as well as behind it

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[*, n] → [*, n]. An input of another dtype than the weight's goes to the model's own code."""
        if hidden_states.dtype != self.weight.dtype:
            normed: torch.Tensor = self.original.forward(self, hidden_states)
            return normed
        return _rms_norm(self, self.rounds_first, hidden_states)


def _rms_norm(module: Any, rounds_first: bool, hidden_states: torch.Tensor) -> torch.Tensor:
    size = hidden_states.shape[-1]
    rows = hidden_states.reshape(-1, size)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    x, target = Rows(rows.data_ptr(), rows.stride(0)), Rows(out.data_ptr(), size)
    eps, tag = norm_eps(module), DTYPE_TAGS[rows.dtype]
    rms_norm(x, module.weight.data_ptr(), target, rows.shape[0], size, eps, rounds_first, tag)
    return out.view(hidden_states.shape)


def substitute_norm(module: Any) -> Reason | None:
    """Turn a norm into a KernelRMSNorm, in place; returns why not, or None if it is one now."""
    if (unfit := why_no_norm(module)) is not None:
        return unfit
    weight = module.weight
    if weight.dtype not in DTYPE_TAGS:
        return f"kernels compute in bfloat16 and float32, not in {weight.dtype}"
    found = closest_norm(module, norm_eps(module), [partial(_rms_norm, module, rounds) for rounds in (True, False)])
    if not isinstance(found, int):
        return found
    module.original, module.rounds_first = type(module), found == 0
    module.__class__ = KernelRMSNorm
    return None


class KernelGatedMLP(nn.Module):
    """Stands for a gated MLP: gate and up in one product, silu(gate) × up in one pass."""

    merged: MergedColwise  # gate and up
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, hidden] → [*, hidden]."""
        both = self.merged.product(x)
        size = both.shape[-1] // 2
        num_rows, out = both.numel() // (2 * size), both.new_empty(*both.shape[:-1], size)
        gate, up = (Rows(both.data_ptr() + half * size * both.element_size(), 2 * size) for half in (0, 1))
        silu_mul(gate, up, out.data_ptr(), num_rows, size, DTYPE_TAGS[both.dtype])
        result: torch.Tensor = self.down_proj(out)
        return result


def substitute_mlp(module: Any, hidden_size: int, dtype: torch.dtype) -> Reason | None:
    """Turn a gated MLP into a KernelGatedMLP, in place; returns why not, or None if it is one now."""
    merged = gate_and_up(module)
    if isinstance(merged, str):
        return merged
    if dtype not in DTYPE_TAGS:
        return f"kernels compute in bfloat16 and float32, not in {dtype}"
    module.merged = merged
    x = random(1, 4, hidden_size, dtype=dtype, device=_CPU)
    reason = difference(lambda: module(x), lambda: KernelGatedMLP.forward(module, x))
    if reason is None:
        module.__class__ = KernelGatedMLP
    return reason


class _Rotary:
    """The rotary function of a model file: by the kernel for usual arguments, else by the model's own code."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Q and k [1, heads, T, D], cos and sin [1, T, D] → the same, rotated."""
        is_usual = not args and kwargs in ({}, {"unsqueeze_dim": 1})
        fits = is_usual and q.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3])
        if not fits or not q.dtype == k.dtype == cos.dtype or q.dtype not in DTYPE_TAGS or q.shape[3] != k.shape[3]:
            return self.own(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.contiguous(), sin.contiguous()
        return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    _, num_heads, num_tokens, size = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    out = x.new_empty(1, num_tokens, num_heads, size)
    source, angles = HeadRows(x.data_ptr(), x.stride(2), x.stride(1)), CosSin(cos.data_ptr(), sin.data_ptr())
    rotate(source, angles, out.data_ptr(), num_tokens, num_heads, size, DTYPE_TAGS[x.dtype])
    return out.transpose(1, 2)


def substitute_rotary(module: nn.Module, dim: int, dtype: torch.dtype) -> Reason | None:
    """Make a module's forward call the kernel instead of its file's rotary function; returns why not, or None."""
    forward: Any = type(module).forward
    own = forward.__globals__.get(ROTARY_NAME)
    if own is None or dtype not in DTYPE_TAGS:
        return f"kernels compute in bfloat16 and float32, not in {dtype}"
    rotary = _Rotary(own)
    q, k = (random(1, heads, 3, dim, dtype=dtype, device=_CPU, seed=heads) for heads in (4, 2))
    cos, sin = (random(1, 3, dim, dtype=dtype, device=_CPU, seed=seed) for seed in (5, 6))
    reason = difference(lambda: own(q, k, cos, sin), lambda: rotary(q, k, cos, sin))
    if reason is None:
        names = {**forward.__globals__, ROTARY_NAME: rotary}
        ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        module.forward = ours.__get__(module)
    return reason
