"""Norms and rotary embeddings on CUDA as one kernel each, where that gives what the model's own code gives.

On a GPU every kernel launch of a decode step costs time; the models' own code takes six for a norm, ten for a rotation.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actors.tensors.backends.forms import uses_rotary, why_no_norm
from actors.tensors.backends.trial import Account, Reason, closest_norm, difference
from actors.tensors.model.parallel_layers import is_rms_norm, norm_eps
from actors.tensors.model.rotary import ROTARY_NAME


@torch.inference_mode()
def substitute_norms(model: nn.Module, account: Account) -> None:
    """Substitute `torch.nn.functional.rms_norm` for the norms that it agrees with."""
    for module in model.modules():
        if is_rms_norm(module):
            account.put("rms_norm", _substitute_norm(module, norm_eps(module)))


def _substitute_norm(module: Any, eps: Any) -> Reason | None:
    if (unfit := why_no_norm(module)) is not None:
        return unfit
    substitute = functools.partial(_rms_norm, module, eps)
    found = closest_norm(module, eps, [substitute])
    if not isinstance(found, int):
        return found
    module.forward = substitute
    return None


def _rms_norm(module: Any, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(hidden_states, module.weight.shape, module.weight, eps)


def substitute_rotary(model: nn.Module, account: Account, compile_function: Callable[[Any], Any] | None = None) -> None:
    """Compile the rotary function of each model file, for CUDA tensors; the account counts files.

    `compile_function`: torch.compile, or in a test another one, whose result is then used on all devices.
    """
    for name in sorted({type(module).__module__ for module in model.modules() if uses_rotary(module)}):
        file: Any = sys.modules[name]
        own = getattr(file, ROTARY_NAME, None)
        if own is None or not name.startswith("transformers.models.") or hasattr(own, "own"):
            continue
        device = next(model.parameters()).device
        rotary = _CompiledRotary(
            own, (compile_function or torch.compile)(own), on_all_devices=compile_function is not None
        )
        if account.put("rotary", _why_not_rotary(rotary, device)):
            setattr(file, ROTARY_NAME, rotary)


class _CompiledRotary:
    """A rotary function, compiled for CUDA tensors; other models of this process use the file's own function."""

    def __init__(self, own: Any, compiled: Any, on_all_devices: bool) -> None:
        self.own, self._compiled, self._on_all_devices = own, compiled, on_all_devices

    def __call__(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        function = self._compiled if query.is_cuda or self._on_all_devices else self.own
        return function(query, *args, **kwargs)


@torch.inference_mode()
def _why_not_rotary(rotary: _CompiledRotary, device: torch.device) -> Reason | None:
    """Why the compiled function is not used; None: it gives what the own one gives, for one and for several tokens."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 3, 5):
        query, key = (torch.randn(1, heads, num_tokens, 16, generator=generator).to(device) for heads in (4, 2))
        angles = torch.randn(1, num_tokens, 8, generator=generator).to(device)
        cos, sin = (torch.cat([x, x], dim=-1) for x in (angles.cos(), angles.sin()))
        arguments = query, key, cos, sin
        reason = difference(functools.partial(rotary.own, *arguments), functools.partial(rotary, *arguments))
        if reason is not None:
            return reason
    return None
