"""Follows tensors through a forward pass: what is computed from their values, and what is not."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Descent(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Follows some tensors, and knows all that are computed from their values while it is the current mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, torch.Tensor] = {}  # by id; kept, so that no other tensor gets it

    def begin(self, tensors: Any) -> None:
        """Follow tensors, in any nest of tuples, lists and dicts."""
        self._known |= {id(tensor): tensor for tensor in _inside(tensors)}

    def reaches(self, tensors: Any, beside: torch.Tensor | None = None) -> bool:
        """Whether a tensor in any nest is followed, or made of one that is, apart from the one that is named."""
        return any(id(tensor) in self._known for tensor in _inside(tensors) if tensor is not beside)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        takes_shape_only = name.startswith("new_") or name.endswith("_like")
        if not takes_shape_only and self.reaches((args, kwargs)):
            self.begin(made)
        return made


def _inside(nest: Any) -> Iterator[torch.Tensor]:
    """The tensors in any nest of tuples, lists and dicts, which is asked for every operation."""
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, tuple | list | dict):
        for one in nest.values() if isinstance(nest, dict) else nest:
            yield from _inside(one)
