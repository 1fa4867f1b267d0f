"""How far numbers may be from float32: as far as Transformers' own run in the served dtype, times a small factor.

In float32 itself the limit is fixed. A row that differs is the rank's fault only where more rows do than in
Transformers' own run: near a tie, rounding decides for it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

FLOAT32 = 1e-4  # of the row's size; a layer's rounding is about 1e-6
# Shards round their summands before these are added, and sums are taken in another order. On tiny models, whose rows
# are short, single rows are up to 4 times as far as Transformers' own, most of them once or twice as far.
FACTOR = 4.0
_SOME = 0.03  # share of rows that may be beyond that for no reason
_NEVER = 2 * FACTOR  # beyond this no row may be
_TAIL = 3.0  # but for so many times as many rows as Transformers' own run has beyond it
_CHOICES = 0.1  # share of rows that may choose other experts: a router is judged by its numbers


@dataclass(frozen=True)
class Judgement:
    """Whether rows are too far from the reference."""

    is_wrong: bool
    allowed: float
    beyond: torch.Tensor  # bool [n]


def judge(ours: Sequence[float], own: Sequence[float] | None, rounding: float) -> Judgement:
    """Judge the distances of rows from float32; `own` are Transformers' own, `rounding` the dtype's unit."""
    distances = torch.tensor(ours, dtype=torch.float64)
    if own is None:
        are_beyond = beyond(distances, None, rounding)
        return Judgement(bool(are_beyond.any()), FLOAT32, are_beyond)
    theirs = torch.tensor(own, dtype=torch.float64)
    usual, counts = float(theirs.median()), {}
    for factor in (FACTOR, _NEVER):
        count = float(beyond(distances, theirs, rounding, factor).sum())
        counts[factor] = count - _TAIL * float((theirs > factor * usual + rounding).sum())
    is_wrong = counts[FACTOR] > _SOME * len(ours) or counts[_NEVER] > 0
    return Judgement(is_wrong, FACTOR * usual + rounding, beyond(distances, theirs, rounding))


def beyond(ours: torch.Tensor, own: torch.Tensor | None, rounding: float, factor: float = FACTOR) -> torch.Tensor:
    """Which rows are further from float32 than rounding takes them, bool [n]."""
    if own is None:
        return ours > FLOAT32
    return ours > factor * own.clamp(min=float(own.median())) + rounding


def judge_choices(ours: Sequence[float], own: Sequence[float]) -> Judgement:
    """Judge whether rows chose the same experts (0) or others (1)."""
    beyond = torch.tensor(ours) > 0
    return Judgement(int(beyond.sum()) > _TAIL * sum(own) + _CHOICES * len(ours), _CHOICES, beyond)


def rounding_unit(dtype: str) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(getattr(torch, dtype)).eps / 2
