"""What of the unsharded model's numbers belongs to one rank, by its slices of the weights.

n rows, a token each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from actors.decisions.model.plan import Plan
from actors.decisions.model.shard_plan import Interval, TensorSlice
from actors.decisions.model.spec import cut_dim
from actors.decisions.model.styles import STYLES
from actors.tensors.verify.recording import LOGITS, Tap


def part_of(plan: Plan, rank: int, tap: Tap, values: torch.Tensor, width: int) -> torch.Tensor | None:
    """The columns of values [n, all] that a rank with `width` of them holds; None where the plan does not say which."""
    size = values.shape[1]
    if size == width:
        return values
    if tap == LOGITS:
        return values[:, slice(*plan.shards[rank].vocab_rows)]
    candidates = [_of_weight(plan, rank, tap), *_of_heads(plan, rank, tap, size)]
    fitting = {found for found in candidates if found and sum(end - first for first, end in found) == width}
    if len(fitting) != 1:
        return None
    return torch.cat([values[:, first:end] for first, end in fitting.pop()], dim=1)


def summand_of(
    plan: Plan, rank: int, name: str, module: Any, args: Sequence[torch.Tensor], kwargs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """What a rank's shard of a module adds to the sum over the shards, by the unsharded module; args have n rows."""
    if isinstance(module, nn.Linear):
        columns = _slice(plan, rank, f"{name}.weight").intervals[1]
        parts = [nn.functional.linear(args[0][:, a:b], module.weight[:, a:b]) for a, b in columns]
        return torch.stack(parts).sum(0)
    whole: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for own_name, parameter in module.named_parameters():
            held = _slice(plan, rank, f"{name}.{own_name}")
            cuts = STYLES[plan.spec.style_of(f"{name}.{own_name}") or "replicate"].cuts
            dim = cut_dim("columns", tuple(parameter.shape)) if cuts == "columns" else None
            if dim is not None or held.is_zero:  # what this rank does not hold adds nothing
                kept = torch.zeros_like(parameter)
                if dim is not None:
                    for first, end in held.intervals[dim]:
                        kept.narrow(dim, first, end - first).copy_(parameter.narrow(dim, first, end - first))
                whole.append((parameter, parameter.data))
                parameter.data = kept
        summand: torch.Tensor = module.forward(*args, **kwargs)
        return summand
    finally:
        for parameter, data in whole:
            parameter.data = data


def _slice(plan: Plan, rank: int, name: str) -> TensorSlice:
    return next(tensor for tensor in plan.shards[rank].tensors if tensor.name == name)


def _of_weight(plan: Plan, rank: int, tap: Tap) -> tuple[Interval, ...] | None:
    """By the module's own weight [out, in] or [out]: what comes out is cut by its rows, what goes in by its columns."""
    tensors = [tensor for tensor in plan.shards[rank].tensors if tensor.name == f"{tap.module}.weight"]
    if not tensors:
        return None
    return tensors[0].intervals[0 if tap.side == "out" else -1]


def _of_heads(plan: Plan, rank: int, tap: Tap, size: int) -> list[tuple[Interval, ...]]:
    """By the heads of its attention: what holds something for each head, or for each KV head."""
    for shard in plan.shards[rank].attentions:
        if tap.module.startswith(shard.spec.name + "."):
            kinds = [(shard.heads, shard.spec.num_heads), (shard.kv_heads, shard.spec.num_kv_heads)]
            return [
                ((first * size // total, end * size // total),) for (first, end), total in kinds if size % total == 0
            ]
    return []
