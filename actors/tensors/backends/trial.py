"""Tries a substitute on random numbers against what it stands for, and keeps the account of what was substituted."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from actors.words.messages import Substitution
from cluster.collectives.interface import LoneShard, PresentGroup

# How far the root mean square of the differences may be from that of the numbers. Rounding alone stays below half of
# it; a factor or a term that is another one does not.
_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.012, torch.float16: 0.0015}


class Account:
    """What is substituted in a model, and why not elsewhere."""

    def __init__(self) -> None:
        self._done: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {}

    def put(self, what: str, reason_not: str | None) -> bool:
        """One place in the model, where it is used, or why not → whether it is."""
        reasons = self._reasons.setdefault(what, Counter())
        if reason_not is None:
            self._done[what] += 1
        else:
            reasons[reason_not] += 1
        return reason_not is None

    def entries(self) -> list[Substitution]:
        """One for each kind of substitute; its reason is the most frequent one, with the number of places."""
        return [
            Substitution(what, self._done[what], "; ".join(_told(*pair) for pair in reasons.most_common()) or None)
            for what, reasons in self._reasons.items()
        ]


def _told(reason: str, count: int) -> str:
    return reason if count == 1 else f"{reason} ({count} places)"


def difference(own: Callable[[], object], substitute: Callable[[], object]) -> str | None:
    """Why a substitute does not give what the model's own code gives; None: it does, but for rounding.

    Both return a tensor, or a tuple of tensors and None.
    """
    try:
        expected = _tensors(own())
    except Exception as error:  # noqa: BLE001 - a model's code fails in its own ways
        return f"the model's own cannot be tried: {_words(error)}"
    try:
        found = _tensors(substitute())
    except Exception as error:  # noqa: BLE001 - so does a compiler
        return f"it fails: {_words(error)}"
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return "it gives other shapes than the model's own"
    return next(filter(None, map(_distance, found, expected)), None)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if found.dtype != expected.dtype:
        return f"it gives {found.dtype}, the model's own {expected.dtype}"
    size = float(expected.double().square().mean().sqrt())
    away = float((found.double() - expected.double()).square().mean().sqrt())
    if away <= _TOLERANCES.get(expected.dtype, 0.0) * size:
        return None
    return f"it differs from the model's own by {away / size if size else away:.2g} of its size"


def _tensors(result: object) -> list[torch.Tensor]:
    results = result if isinstance(result, tuple | list) else [result]
    return [tensor for tensor in results if isinstance(tensor, torch.Tensor)]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def norm_inputs(size: int, eps: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows [3, size] for a norm: large numbers, usual ones, and small ones where `eps` counts."""
    rows = random(3, size, dtype=torch.float32, device=device) * torch.tensor([[30.0], [1.0], [eps**0.5]]).to(device)
    return (rows + 0.1 * rows.abs()).to(dtype)


@contextmanager
def exchanging_nothing(group: PresentGroup) -> Iterator[None]:
    """While it lasts, the layers of a shard keep their own summands, so that each shard can try by itself."""
    present, group.group = group.group, LoneShard()
    try:
        yield
    finally:
        group.group = present
        group.take_seconds()
