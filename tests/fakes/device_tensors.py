"""Tensors of the CPU that behave as those of a GPU do: the host cannot read them but through a download.

Every operator that makes the host wait for a GPU raises HostWait: reading a number, shapes that follow from values,
copies to the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

WAITING_OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "is_nonzero",
    "equal",
    "repeat_interleave",
}
WAITING_METHODS = {"cpu", "numpy", "tolist", "item", "__array__"}


class HostWait(AssertionError):
    """The host would wait for the device."""


class DeviceTensor(torch.Tensor):
    """A tensor of the pretended device; `inner` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = operator._schema.name.removeprefix("aten::"), kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and tree_any(
            lambda index: isinstance(index, torch.Tensor) and index.dtype == torch.bool, args[1]
        )
        if name in WAITING_OPERATORS or by_mask:
            raise HostWait(name)
        result = operator(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
        if operator._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree_map(on_device, result)


class NoReading(TorchFunctionMode):
    """While it is entered, methods that copy to the host raise, too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in WAITING_METHODS and isinstance(args[0], DeviceTensor):
            raise HostWait(function.__name__)
        return function(*args, **(kwargs or {}))


def on_device(value: Any) -> Any:
    """A tensor as one of the device; anything else as it is."""
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor)
    return DeviceTensor(value) if is_plain else value


def unwrapped(value: Any) -> Any:
    """The numbers of a tensor of the device."""
    return value.inner if isinstance(value, DeviceTensor) else value


class SlowDownload:
    """Arrives only when `arrive` was called on its maker."""

    def __init__(self, numbers: torch.Tensor, has_arrived: Callable[[], bool]) -> None:
        self.numbers, self.is_ready = numbers, has_arrived

    def take(self) -> torch.Tensor:
        assert self.is_ready(), "the host waits for a download"
        return self.numbers
