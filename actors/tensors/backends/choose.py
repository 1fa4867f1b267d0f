"""Chooses the backend for a device: one of the two that are shipped, or a class that the config names."""

import importlib
from typing import TYPE_CHECKING, Any, Literal

from actors.decisions.model.plan import DEFAULT_BLOCK_SIZE
from configs.config import is_backend_class

if TYPE_CHECKING:
    import torch

    from actors.tensors.backend import Backend

_SHIPPED = {
    "cpu": "actors.tensors.backends.cpu.backend:CPUBackend",
    "cuda": "actors.tensors.backends.cuda.backend:CUDABackend",
}
# As their classes say, for the replica, which must not import torch for it.
_BLOCK_SIZES = {"cpu": DEFAULT_BLOCK_SIZE, "cuda": DEFAULT_BLOCK_SIZE}


def backend_class(device: str) -> "type[Backend]":
    """The class for `cpu`, `cuda` or package.module:Class. Raises ValueError where that cannot be imported."""
    path = _SHIPPED.get(device, device)
    assert is_backend_class(path), f"{device} must be resolved before a backend is chosen"
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"device: {device} cannot be imported here ({reason}); install it on every node") from error
    missing = [name for name in ("placed_on", "default_block_size", "set_up") if not hasattr(found, name)]
    if missing:
        raise ValueError(f"device: {device} is no backend: it has no {', '.join(missing)} (actors/tensors/backend.py)")
    return found  # type: ignore[no-any-return]


def import_backend(asked: str, placed: str) -> "type[Backend]":
    """The class for a config's `device`, on ranks that got `placed` (cpu or cuda). Raises ValueError."""
    return backend_class(asked if is_backend_class(asked) else placed)


def make_backend(asked: str, device: "torch.device") -> "Backend":
    """The backend of a rank that was given a torch device; `asked` is the config's `device`."""
    return import_backend(asked, device.type)(device)  # type: ignore[call-arg]


def default_block_size(asked: str, placed: str) -> int:
    """Tokens in a block of the KV cache where the config names none: for its `device`, on ranks that got `placed`."""
    return backend_class(asked).default_block_size if is_backend_class(asked) else _BLOCK_SIZES[placed]


def placed_on(device: str) -> Literal["auto", "cpu", "cuda"]:
    """What Ray must give each rank for this `device` of a config; a class says so by its `placed_on`."""
    if device in ("auto", "cpu", "cuda"):
        return device  # type: ignore[return-value]
    placed: Literal["cpu", "cuda"] = backend_class(device).placed_on
    return placed
