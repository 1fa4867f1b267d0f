"""Norms and rotary embeddings on CUDA as one kernel each, where that gives what the model's own code does.

On a GPU every kernel of a decode step costs its start; the models write a norm as six of them and a rotation as ten.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actors.tensors.backends.trial import Account, Reason, difference, norm_inputs
from actors.tensors.model.parallel_layers import ColwiseRMSNorm, norm_eps
from actors.tensors.model.rotary import ROTARY_NAME


@torch.inference_mode()
def substitute_norms(model: nn.Module, account: Account) -> None:
    """Let `torch.nn.functional.rms_norm` stand for the norms that it agrees with."""
    for module in model.modules():
        weights, eps = dict(module.named_parameters()), norm_eps(module)
        is_norm = set(weights) == {"weight"} and weights["weight"].dim() == 1 and isinstance(eps, float)
        if is_norm and not isinstance(module, nn.LayerNorm):
            account.put("rms_norm", _substitute_norm(module, eps))


def _substitute_norm(module: Any, eps: Any) -> Reason | None:
    if isinstance(module, ColwiseRMSNorm) and module.group.size > 1:
        return "its mean is taken over the heads of all shards"
    rows = norm_inputs(len(module.weight), eps, module.weight.dtype, module.weight.device)
    for row in rows:
        reason = difference(functools.partial(module, row[None]), functools.partial(_rms_norm, module, eps, row[None]))
        if reason is not None:
            return reason
    module.forward = functools.partial(_rms_norm, module, eps)
    return None


def _rms_norm(module: Any, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(hidden_states, module.weight.shape, module.weight, eps)


def substitute_rotary(model: nn.Module, account: Account, compile_function: Callable[[Any], Any] | None = None) -> None:
    """Compile the rotary function of the model's own files, for CUDA tensors: one place in the account for each file.

    A compiler keeps a function's meaning whatever it is. `compile_function`: torch.compile, unless a test has another;
    then it is not only for CUDA tensors.
    """
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file: Any = sys.modules[name]
        own = getattr(file, ROTARY_NAME, None)
        if own is None or not name.startswith("transformers.models.") or hasattr(own, "own"):
            continue
        device = next(model.parameters()).device
        fused = _Fused(own, (compile_function or torch.compile)(own), everywhere=compile_function is not None)
        if account.put("rotary", _rotary_fault(fused, device)):
            setattr(file, ROTARY_NAME, fused)


class _Fused:
    """A function and its compiled form, which is for CUDA tensors: other models of this process keep theirs."""

    def __init__(self, own: Any, compiled: Any, everywhere: bool) -> None:
        self.own, self._compiled, self._everywhere = own, compiled, everywhere

    def __call__(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        function = self._compiled if query.is_cuda or self._everywhere else self.own
        return function(query, *args, **kwargs)


@torch.inference_mode()
def _rotary_fault(fused: _Fused, device: torch.device) -> Reason | None:
    """Why a compiled function is not used; None: it gives what the function gives, for one and for several tokens."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 3, 5):
        query, key = (torch.randn(1, heads, num_tokens, 16, generator=generator).to(device) for heads in (4, 2))
        angles = torch.randn(1, num_tokens, 8, generator=generator).to(device)
        cos, sin = (torch.cat([x, x], dim=-1) for x in (angles.cos(), angles.sin()))
        arguments = query, key, cos, sin
        reason = difference(functools.partial(fused.own, *arguments), functools.partial(fused, *arguments))
        if reason is not None:
            return reason
    return None
