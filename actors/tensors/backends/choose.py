"""Which backend serves a device: the two that are shipped, or a class that the config names. Imports one when asked."""

import importlib
from typing import TYPE_CHECKING, Any, Literal

from configs.config import is_backend_class

if TYPE_CHECKING:
    from actors.tensors.backend import Backend

_SHIPPED = {
    "cpu": "actors.tensors.backends.cpu.backend:CPUBackend",
    "cuda": "actors.tensors.backends.cuda.backend:CUDABackend",
}


def backend_class(device: str) -> "type[Backend]":
    """The class for `cpu`, `cuda` or package.module:Class. Raises ValueError where that cannot be imported."""
    path = _SHIPPED.get(device, device)
    assert is_backend_class(path), f"{device} is settled before a backend is chosen"
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises, it cannot be used
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"device: {device} cannot be imported here ({reason}); install it on every node") from error
    missing = [name for name in ("placed_on", "default_block_size", "set_up") if not hasattr(found, name)]
    if missing:
        raise ValueError(f"device: {device} is no backend: it has no {', '.join(missing)} (actors/tensors/backend.py)")
    return found  # type: ignore[no-any-return]


def placed_on(device: str) -> Literal["auto", "cpu", "cuda"]:
    """What Ray must give each rank for this `device` of a config; a class says it itself."""
    if device in ("auto", "cpu", "cuda"):
        return device  # type: ignore[return-value]
    return backend_class(device).placed_on
