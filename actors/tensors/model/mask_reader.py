"""Reads a MaskSpec from the mask function that a model builds, by calling it, not from config keys."""

import inspect
import math
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch

from actors.decisions.model.spec import MaskSpec
from actors.words.errors import UnsupportedModel

MaskFunction = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]

_MAX_POSITIONS = 1 << 18  # a window wider than that counts as none


def read_mask(mask_function: MaskFunction, max_position: int) -> MaskSpec:
    """The MaskSpec that agrees with a function (batch, head, query position, key position) → visible.

    Raises UnsupportedModel when none does: for tokens that see later ones, and patterns other than windows and chunks.
    """
    mask_function = _without_tensors(mask_function)
    last = min(max_position, _MAX_POSITIONS) - 1
    queries = sorted({*range(min(last + 1, 64)), last, *(last * part // 23 for part in range(23))})
    keys = torch.arange(last + 1)
    firsts = []
    for query in queries:
        visible = torch.as_tensor(mask_function(0, 0, torch.tensor(query), keys)).expand(last + 1)
        first = int(visible.int().argmax())
        if not torch.equal(visible, (keys >= first) & (keys <= query)):
            raise UnsupportedModel(
                f"the mask of token {query} is not a run of tokens up to itself, which is not supported"
            )
        firsts.append(first)
    return _fit(queries, firsts)


def _fit(queries: list[int], firsts: list[int]) -> MaskSpec:
    candidates = [MaskSpec()]
    if any(firsts):
        candidates += [MaskSpec(window=max(query - first + 1 for query, first in zip(queries, firsts, strict=True)))]
        candidates += [MaskSpec(chunk=math.gcd(*firsts))]
    for mask_spec in candidates:
        if all(mask_spec.first_key(query) == first for query, first in zip(queries, firsts, strict=True)):
            return mask_spec
    raise UnsupportedModel("the attention mask is neither a window nor a chunk, which is not supported")


def _without_tensors(function: Any) -> Any:
    """The same function with zeros for the tensors in its closure, which say how a batch is padded: here it never is.

    They are fake tensors, which have no values.
    """
    if not inspect.isfunction(function) or not function.__closure__:
        return function
    cells = tuple(CellType(_without_tensors_in(cell.cell_contents)) for cell in function.__closure__)
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


def _without_tensors_in(held: Any) -> Any:
    if isinstance(held, torch.Tensor):
        return torch.zeros(held.shape, dtype=held.dtype)
    if isinstance(held, tuple):
        return tuple(_without_tensors_in(item) for item in held)
    return _without_tensors(held)
