"""Norms and rotary embeddings as one kernel each: nothing is taken by its name, all is tried against the model's own.

On a GPU every kernel of a decode step costs its start; the models write a norm as six of them and a rotation as ten.
What differs from the model's own, or fails, stays as the model has it. None of this has run on a GPU.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actors.tensors.model.parallel_layers import norm_eps

logger = logging.getLogger(__name__)

ROTARY_NAME = "apply_rotary_pos_emb"  # what Transformers' model files call it; all give (q, k, cos, sin)


def fuse(model: nn.Module) -> None:
    """Everything that is known here, on a model that is loaded and is on a GPU."""
    num_norms, num_rotaries = fuse_norms(model), fuse_rotary(model)
    logger.info("fused %d norms, and the rotary embedding of %d model files", num_norms, num_rotaries)


def fuse_norms(model: nn.Module) -> int:
    """Let `torch.nn.functional.rms_norm` stand for norms that it agrees with; → how many."""
    number = 0
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), _eps(module)
        if (
            eps is None
            or not isinstance(weight, torch.Tensor)
            or weight.dim() != 1
            or len(list(module.parameters())) > 1
        ):
            continue
        if not isinstance(module, nn.LayerNorm) and _agrees(module, weight, eps):
            module.forward = functools.partial(_rms_norm, module, eps)
            number += 1
    return number


def _eps(module: nn.Module) -> float | None:
    eps = norm_eps(module)
    return eps if isinstance(eps, float) else None


def _rms_norm(module: nn.Module, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return nn.functional.rms_norm(hidden_states, weight.shape, weight, eps)


@torch.inference_mode()
def _agrees(module: nn.Module, weight: torch.Tensor, eps: float) -> bool:
    """Whether both round the same numbers: large ones, usual ones, and small ones where `eps` counts."""
    generator = torch.Generator().manual_seed(0)
    x_3H = torch.randn(3, len(weight), generator=generator) * torch.tensor([[30.0], [1.0], [eps**0.5]])
    x_3H = (x_3H + 0.1 * x_3H.abs()).to(weight.device, weight.dtype)
    try:
        own, fused = module(x_3H), _rms_norm(module, eps, x_3H)
    except (RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(own, torch.Tensor) or own.dtype != fused.dtype or own.shape != fused.shape:
        return False
    # The model rounds before it multiplies by the weight, and after: half a place each
    return torch.allclose(own.float(), fused.float(), rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-6)


def fuse_rotary(model: nn.Module, compile_function: Callable[[Any], Any] | None = None) -> int:
    """Compile the rotary function of the model's own files, for CUDA tensors; → of how many files.

    A compiler keeps a function's meaning whatever it is. `compile_function`: torch.compile, unless a test has another;
    then it is not only for CUDA tensors.
    """
    number = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file: Any = sys.modules[name]
        own = getattr(file, ROTARY_NAME, None)
        if own is None or not name.startswith("transformers.models.") or hasattr(own, "own"):
            continue
        device = next(model.parameters()).device
        fused = _Fused(own, (compile_function or torch.compile)(own), everywhere=compile_function is not None)
        if (reason := _rotary_fault(fused, device)) is None:
            setattr(file, ROTARY_NAME, fused)
            number += 1
        else:
            logger.info("the rotary embedding of %s stays as it is: %s", name, reason)
    return number


class _Fused:
    """A function and its compiled form, which is for CUDA tensors: other models of this process keep theirs."""

    def __init__(self, own: Any, compiled: Any, everywhere: bool) -> None:
        self.own, self._compiled, self._everywhere = own, compiled, everywhere

    def __call__(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        function = self._compiled if query.is_cuda or self._everywhere else self.own
        return function(query, *args, **kwargs)


@torch.inference_mode()
def _rotary_fault(fused: _Fused, device: torch.device) -> str | None:
    """Why a compiled function is not used; None: it gives what the function gives, for one and for several tokens."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 3, 5):
        query, key = (torch.randn(1, heads, num_tokens, 16, generator=generator).to(device) for heads in (4, 2))
        angles = torch.randn(1, num_tokens, 8, generator=generator).to(device)
        cos, sin = (torch.cat([x, x], dim=-1) for x in (angles.cos(), angles.sin()))
        try:
            found, expected = fused(query, key, cos, sin), fused.own(query, key, cos, sin)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        except Exception as error:  # noqa: BLE001 - a compiler fails in its own ways
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
