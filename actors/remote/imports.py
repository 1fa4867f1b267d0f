"""Imports torch and Transformers fast: without this, half of a rank's start is imports, after a lost rank too.

Transformers' model code marks functions for torch.compile, and defines parallelism of its own. Both import hundreds of
modules, and no rank uses either.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

_COMPILER = "torch._dynamo"
_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"  # for masks made by vmap, which are not used here


class _Marks(ModuleType):
    """Stands in for the compiler's modules while functions are marked for it; its marks change nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # a package, none of whose other submodules can be found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _mark


def _mark(function: Callable[..., Any] | None = None, *how: Any, **named: Any) -> Any:
    return (lambda later: later) if function is None else function


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector during imports: they make many objects that stay, and it would take a tenth."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Inside of this, model code is imported without the compiler, which can be imported normally afterwards.

    It must be the first import of model code in a process; where the compiler is imported already, it does nothing.
    Transformers' own tensor and expert parallelism and its masks by vmap cannot be used in such a process.
    """
    if _COMPILER in sys.modules:
        yield
        return
    import torch
    from transformers.utils import is_torch_distributed_available

    with mock.patch.object(torch.distributed, "is_available", lambda: False):
        is_torch_distributed_available()  # its first answer is cached
    stand_ins = {name: _Marks(name) for name in (_COMPILER, _MASKS)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
