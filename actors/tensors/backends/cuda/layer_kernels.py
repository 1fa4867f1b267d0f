"""Triton kernels of norms with residuals and of gated activations, and the functions that launch them.

N columns of a row.
They compute in float32. Norms round where the models' own code rounds; gates round once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_COLUMNS = tl.constexpr(1024)  # of a program
ACTIVATIONS = ("silu", "gelu_tanh")


class NormShape(NamedTuple):
    """What `_add_rms_norm` is compiled for."""

    size: int
    padded: int  # to a power of two
    adds: bool  # y to x
    has_norm: bool  # of the sum
    rounds_first: bool  # before the weight, as well as behind it
    has_norm_of_y: bool
    rounds_y_first: bool


@triton.jit
def _rms_normed(
    x_N: tl.tensor, weight: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr, PADDED: tl.constexpr, ROUNDS: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The root-mean-square norm of a row in float32, which is zero from SIZE on; rounded to `dtype`, but not cast."""
    column = tl.arange(0, PADDED)
    normed_N = x_N * tl.rsqrt(tl.sum(x_N * x_N, 0) / SIZE + eps)
    if ROUNDS:
        normed_N = normed_N.to(dtype).to(tl.float32)
    normed_N *= tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    return normed_N.to(dtype).to(tl.float32)


@triton.jit
def _add_rms_norm(
    x: tl.tensor, y: tl.tensor, weight: tl.tensor, eps: tl.tensor, weight_of_y: tl.tensor, eps_of_y: tl.tensor,
    total: tl.tensor, normed: tl.tensor, SHAPE: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row: total = x + y, or x + the norm of y, and the norm of that. All [rows, N], weights [N].

    Without `adds` it is the norm of x.
    """
    dtype = x.dtype.element_ty
    column = tl.arange(0, SHAPE.padded)
    at, is_column = tl.program_id(0).to(tl.int64) * SHAPE.size + column, column < SHAPE.size
    sum_N = tl.load(x + at, mask=is_column, other=0.0).to(tl.float32)
    if SHAPE.adds:
        y_N = tl.load(y + at, mask=is_column, other=0.0).to(tl.float32)
        if SHAPE.has_norm_of_y:
            y_N = _rms_normed(y_N, weight_of_y, eps_of_y, SHAPE.size, SHAPE.padded, SHAPE.rounds_y_first, dtype)
        sum_N = (sum_N + y_N).to(dtype).to(tl.float32)
        tl.store(total + at, sum_N.to(dtype), mask=is_column)
    if SHAPE.has_norm:
        normed_N = _rms_normed(sum_N, weight, eps, SHAPE.size, SHAPE.padded, SHAPE.rounds_first, dtype)
        tl.store(normed + at, normed_N.to(dtype), mask=is_column)


@triton.jit
def _gate(both: tl.tensor, out: tl.tensor, row_stride: tl.tensor, N: tl.constexpr, IS_SILU: tl.constexpr) -> None:
    """One program for some columns of a row: activation(gate) × up. both [rows, 2 N], gate first; out [rows, N]."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
    is_column = column < N
    gate = tl.load(both + row * row_stride + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(both + row * row_stride + N + column, mask=is_column, other=0.0).to(tl.float32)
    # x × sigmoid(x) is silu; gelu by its tanh is x × sigmoid(2 × (what the tanh is taken of))
    inner = gate if IS_SILU else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = gate / (1.0 + tl.exp(-inner))
    tl.store(out + row * N + column, (active * up).to(out.dtype.element_ty), mask=is_column)


class Norm(NamedTuple):
    """How a root-mean-square norm computes."""

    weight_N: torch.Tensor
    eps: float
    rounds_first: bool = False  # before the weight, as well as behind it


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, norm: Norm | None, norm_of_y: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of x and y, or of x and the norm of y, and the norm of the sum, or the sum; all [*, N]."""
    x, y = x.contiguous(), y.contiguous()
    total = x.new_empty(x.shape)
    normed = total if norm is None else x.new_empty(x.shape)
    _launch_norms(x, y, total, normed, norm, norm_of_y)
    return total, normed


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The root-mean-square norm of x [*, N]."""
    x = x.contiguous()
    normed = x.new_empty(x.shape)
    _launch_norms(x, None, x, normed, norm, None)
    return normed


def _launch_norms(
    x: torch.Tensor,
    y: torch.Tensor | None,
    total: torch.Tensor,
    normed: torch.Tensor,
    norm: Norm | None,
    norm_of_y: Norm | None,
) -> None:
    size, padded = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    of_sum, of_y = norm or Norm(x, 0.0), norm_of_y or Norm(x, 0.0)
    shape = NormShape(
        size, padded, y is not None, norm is not None, of_sum.rounds_first, norm_of_y is not None, of_y.rounds_first
    )
    _add_rms_norm[(x.numel() // size,)](
        x, x if y is None else y, of_sum.weight_N, of_sum.eps, of_y.weight_N, of_y.eps, total, normed, SHAPE=shape,
        num_warps=min(16, max(1, padded // 512)),
    )  # fmt: skip


def gate(both: torch.Tensor, activation: str) -> torch.Tensor:
    """Gate and up [*, 2 N] → activation(gate) × up [*, N]."""
    rows = both.reshape(-1, both.shape[-1])
    out = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    size = out.shape[-1]
    _gate[(len(rows), triton.cdiv(size, _COLUMNS.value))](
        rows, out, rows.stride(0), N=size, IS_SILU=activation == "silu", num_warps=4
    )
    return out
