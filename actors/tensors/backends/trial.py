"""Tries substitutes on random numbers against what they stand for, and keeps account of what was substituted."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from actors.words.messages import Substitution
from cluster.collectives.interface import LoneShard, PresentGroup

# Allowed root mean square of the differences, relative to that of the expected numbers. Rounding alone stays below half
# of it; a wrong factor or a missing term does not.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.008, torch.float16: 0.001}
_SPREADS = 1.5  # times the difference that one more rounding of its inputs makes in the model's own output


class Deviation(NamedTuple):
    """How far a substitute's output is from the model's own: relative root mean square of the differences."""

    amount: float


Reason = str | Deviation  # why something is not substituted


class Account:
    """Counts what is substituted in a model, with the reasons where it is not."""

    def __init__(self) -> None:
        self._done: Counter[str] = Counter()
        self._reasons: dict[str, list[Reason]] = {}

    def put(self, what: str, reason_not: Reason | None) -> bool:
        """Count one use of the substitute `what`, or why it is not used there → whether it is used."""
        reasons = self._reasons.setdefault(what, [])
        if reason_not is None:
            self._done[what] += 1
        else:
            reasons.append(reason_not)
        return reason_not is None

    def entries(self) -> list[Substitution]:
        """One Substitution for each kind of substitute, with its reasons and how often each occurred."""
        return [Substitution(what, self._done[what], _summary(reasons)) for what, reasons in self._reasons.items()]


def _summary(reasons: list[Reason]) -> str | None:
    deviations = [reason.amount for reason in reasons if isinstance(reason, Deviation)]
    counts = Counter(reason for reason in reasons if isinstance(reason, str))
    if deviations:
        largest = max(deviations, key=lambda amount: (math.isnan(amount), amount))
        counts[f"it differs from the model's own by {largest:.2g} of its size"] = len(deviations)
    parts = [reason if count == 1 else f"{reason} ({count} places)" for reason, count in counts.most_common()]
    return "; ".join(parts) or None


def difference(
    own: Callable[[], object], substitute: Callable[[], object], nudged: Callable[[], object] | None = None
) -> Reason | None:
    """Why a substitute does not give what the model's own code gives; None: it does, but for rounding.

    All three return a tensor, or a sequence of tensors and None. `nudged` runs the model's own code on inputs that were
    rounded once more. Where attention is peaked, its output then differs by more than the usual tolerance, and the
    substitute's may differ as much.
    """
    try:
        expected = _tensors(own())
        spread = max(map(_distance, _tensors(nudged()), expected), default=0.0) if nudged is not None else 0.0
    except Exception as error:  # noqa: BLE001 - a model's code fails in its own ways
        return f"the model's own code fails in the trial: {_words(error)}"
    try:
        found = _tensors(substitute())
    except Exception as error:  # noqa: BLE001 - so does a compiler
        return f"it fails: {_words(error)}"
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return "it gives other shapes than the model's own"
    if [tensor.dtype for tensor in found] != [tensor.dtype for tensor in expected]:
        return "it gives other dtypes than the model's own"
    for one, other in zip(found, expected, strict=True):
        away = _distance(one, other)
        if not away <= max(_TOLERANCES.get(other.dtype, 0.0), _SPREADS * spread):  # NaN is too far as well
            return Deviation(away)
    return None


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the differences, relative to that of the expected numbers."""
    size = float(expected.double().square().mean().sqrt())
    away = float((found.double() - expected.double()).square().mean().sqrt())
    return away / size if size else away


def _tensors(result: object) -> list[torch.Tensor]:
    results = result if isinstance(result, tuple | list) else [result]
    return [tensor for tensor in results if isinstance(tensor, torch.Tensor)]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def closest_norm(norm: Any, eps: float, candidates: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> int | Reason:
    """Which of some substitutes of a norm gives what it gives, by index; the closest, if several do. Or why none does.

    On rows [1, n]: of large numbers, usual ones, and small ones where `eps` counts. One row at a time: next to large
    numbers, errors of small ones would not count.
    """
    weight: torch.Tensor = norm.weight
    usual = random(1, len(weight), dtype=torch.float32, device=weight.device)
    usual += 0.1 * usual.abs()
    rows = [(size * usual).to(weight.dtype) for size in (30.0, 1.0, eps**0.5)]
    fitting: dict[int, float] = {}
    reason: Reason | None = None
    for index, substitute in enumerate(candidates):
        reasons = (difference(partial(norm, row), partial(substitute, row)) for row in rows)
        found = next((one for one in reasons if one is not None), None)
        if found is None:
            fitting[index] = sum(_distance(substitute(row), norm(row)) for row in rows)
        reason = reason or found
    if fitting:
        return min(fitting, key=lambda index: fitting[index])
    assert reason is not None, "there are candidates"
    return reason


@contextmanager
def exchanging_nothing(group: PresentGroup) -> Iterator[None]:
    """A context in which the layers exchange nothing with other shards, so that each shard can run trials by itself."""
    present, group.group = group.group, LoneShard()
    try:
        yield
    finally:
        group.group = present
        group.take_seconds()
