"""Fuses, on CPU, what a model does in several passes: sibling projections into one product, norms, rotary, gated MLPs.

A module is recognised by its code: where its forward is, byte for byte, that of a Llama module whose meaning we know, a
kernel computes the same. So families need no table, and one that computes something else is left as it is.
"""

import inspect
from collections import defaultdict
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as known

from actors.tensors.backends.cpu import kernels
from actors.tensors.backends.cpu.llama.attention import KNOWN, fuse_attention
from actors.tensors.backends.cuda.module_kernels import ROTARY_NAME
from actors.tensors.model.linear import LinearMethod, PanelPackedLinear, pack
from actors.tensors.model.parallel_layers import ColwiseLinear, may_be_packed


class MergedColwise:
    """Linear layers of one module that get the same input: their weights are packed, and multiplied, as one."""

    def __init__(self, layers: list[ColwiseLinear]) -> None:
        """Takes the weights over; the layers keep their biases."""
        self.layers = layers
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self._whole = nn.Linear(layers[0].in_features, sum(self.sizes), bias=False, device="meta")
        self._whole.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        self._packed = pack(self._whole)
        biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}  # that no layer has taken yet, by its place
        self._are_proven = False  # all layers have asked for one product

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[*, in] → [*, out of all layers, one after the other]."""
        return self._packed.multiply(self._whole, x, self._bias)

    def addresses(self) -> tuple[int, int] | None:
        """See `PanelPackedLinear.addresses`; None where their weights lie otherwise."""
        return self._packed.addresses(self._bias) if isinstance(self._packed, PanelPackedLinear) else None

    def are_finite(self) -> bool:
        """Whether all their weights are numbers."""
        return self._packed.is_finite(self._whole)

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """[*, in] → [*, out of one layer]: whoever asks first computes for all."""
        if self._input is not x or place not in self._parts:
            if self._parts and not self._are_proven:
                return self.split_again(place, x)
            self._input, self._parts = x, dict(enumerate(torch.split(self.product(x), self.sizes, dim=-1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._input, self._are_proven = None, True
        return part

    def split_again(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """They do not get the same input: from now on each multiplies for itself."""
        for layer, weight in zip(self.layers, torch.split(self._packed.weight(), self.sizes), strict=True):
            layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            layer.method = pack(layer)
        self._input, self._parts = None, {}
        layer = self.layers[place]
        return layer.method.multiply(layer, x, layer.bias)


class MergedPart(LinearMethod):
    """One layer's part of what its siblings multiply."""

    def __init__(self, siblings: MergedColwise, place: int) -> None:
        self.siblings = siblings
        self.place = place

    def prepare(self, layer: nn.Module) -> None:
        """The siblings hold the weight: leave one of no elements, whose dtype and device may still be asked."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def multiply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out], its bias included."""
        return self.siblings.part(self.place, x)

    def is_finite(self, layer: nn.Module) -> bool:
        """The first one answers for all."""
        return self.place > 0 or self.siblings.are_finite()


class KernelRMSNorm(nn.Module):
    """Llama's root-mean-square norm in one pass."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[*, n] → [*, n]."""
        if hidden_states.dtype != self.weight.dtype:
            normed: torch.Tensor = known.LlamaRMSNorm.forward(self, hidden_states)
            return normed
        size = hidden_states.shape[-1]
        rows = hidden_states.reshape(-1, size)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        kernels.rms_norm(
            rows.data_ptr(),
            self.weight.data_ptr(),
            out.data_ptr(),
            rows.shape[0],
            size,
            rows.stride(0),
            size,
            self.variance_epsilon,
            kernels.DTYPE_TAGS[rows.dtype],
        )
        return out.view(hidden_states.shape)


class KernelGatedMLP(nn.Module):
    """Llama's MLP with both projections in one product, and what is between them and the last in one pass."""

    siblings: MergedColwise
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, hidden] → [1, T, hidden]."""
        both = self.siblings.product(x)
        size = both.shape[-1] // 2
        num_rows, step = both.numel() // (2 * size), size * both.element_size()
        out = both.new_empty(*both.shape[:-1], size)
        gate = both.data_ptr()
        kernels.silu_mul(
            gate, gate + step, out.data_ptr(), num_rows, size, 2 * size, 2 * size, kernels.DTYPE_TAGS[both.dtype]
        )
        result: torch.Tensor = self.down_proj(out)
        return result


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama's `apply_rotary_pos_emb`: q and k [1, heads, T, D], cos and sin [1, T, D] → the same, rotated."""
    can_use_kernel = unsqueeze_dim == 1 and q.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3])
    if (
        not can_use_kernel
        or not q.dtype == k.dtype == cos.dtype
        or q.dtype not in kernels.DTYPE_TAGS
        or q.shape[3] != k.shape[3]
    ):
        rotated: tuple[torch.Tensor, torch.Tensor] = known.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return rotated
    cos, sin = cos.contiguous(), sin.contiguous()
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    _, num_heads, num_tokens, size = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    out = x.new_empty(1, num_tokens, num_heads, size)
    strides = x.stride(2), x.stride(1)
    kernels.rotate(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        num_tokens,
        num_heads,
        size,
        strides,
        kernels.DTYPE_TAGS[x.dtype],
    )
    return out.transpose(1, 2)


def fuse(model: nn.Module) -> None:
    """Put kernels where they compute what the model's own code does. Its weights hold their values; CPU only."""
    for module in model.modules():
        _join_siblings(module)
    for module in model.modules():
        if computes_as(module, known.LlamaRMSNorm) and module.weight.dtype in kernels.DTYPE_TAGS:
            module.__class__ = KernelRMSNorm
        elif computes_as(module, known.LlamaMLP):
            _fuse_mlp(module)
        elif not (any(computes_as(module, kind) for kind in KNOWN) and _fuse_attention(module)):
            _fuse_rotary(module)


def _join_siblings(parent: nn.Module) -> None:
    alike: dict[tuple[int, torch.dtype, bool], list[ColwiseLinear]] = defaultdict(list)
    for child in parent.children():
        if type(child) is ColwiseLinear and may_be_packed(child):
            alike[child.in_features, child.weight.dtype, child.bias is None].append(child)
    for layers in alike.values():
        if len(layers) > 1:
            siblings = MergedColwise(layers)
            for place, layer in enumerate(layers):
                layer.method = MergedPart(siblings, place)
                layer.method.prepare(layer)


def _fuse_attention(module: Any) -> bool:
    method = getattr(module.q_proj, "method", None)
    rotary = inspect.unwrap(type(module).forward).__globals__.get(ROTARY_NAME)
    return isinstance(method, MergedPart) and _is_known_rotary(rotary) and fuse_attention(module, method.siblings)


def _is_known_rotary(function: Any) -> bool:
    """Whether a function is Llama's rotation, and turns the same halves: others interleave them under the same name."""
    if not _is_same(function, known.apply_rotary_pos_emb):
        return False
    return _is_same(inspect.unwrap(function).__globals__.get("rotate_half"), known.rotate_half)


def _fuse_mlp(module: Any) -> None:
    gate, up = getattr(module.gate_proj, "method", None), getattr(module.up_proj, "method", None)
    if not isinstance(gate, MergedPart) or not isinstance(up, MergedPart) or gate.siblings is not up.siblings:
        return
    if isinstance(module.act_fn, nn.SiLU | SiLUActivation) and (gate.place, up.place, len(gate.siblings.layers)) == (
        0,
        1,
        2,
    ):
        module.siblings = gate.siblings
        module.__class__ = KernelGatedMLP


def _fuse_rotary(module: nn.Module) -> None:
    """Let this module's own forward find our function where it looks for Llama's."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return
    rotary = forward.__globals__.get(ROTARY_NAME)
    if ROTARY_NAME in forward.__code__.co_names and _is_known_rotary(rotary):
        names = {**forward.__globals__, ROTARY_NAME: rotate_both}
        ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        module.forward = ours.__get__(module)


def computes_as(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module computes what `kind` does: its own forward is the same code, or it has been left alone."""
    return _is_same(type(module).forward, kind.forward)


def _is_same(function: Any, other: Any) -> bool:
    return _meaning(function) == _meaning(other) is not None


def _meaning(function: Any) -> tuple[object, ...] | None:
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    constants = tuple(const for const in code.co_consts if not isinstance(const, str))  # without its docstring
    return code.co_code, code.co_names, constants
