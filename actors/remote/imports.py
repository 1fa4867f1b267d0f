"""Importing torch and Transformers fast: half of a rank's start, also of one that takes the place of a lost one.

When its modelling code is imported, Transformers marks functions for torch.compile and defines parallelism of its own.
Both bring hundreds of modules with them, and no rank uses either.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

_COMPILER = "torch._dynamo"
_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"  # for masks by vmap; ours are made without


class _Marks(ModuleType):
    """Stands in for the compiler while functions are marked for it. A mark changes nothing."""

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
    """Imports make hundreds of thousands of objects that stay: looking through them again and again takes a tenth."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Import what builds models inside of this, first in a process. Afterwards the compiler can be imported as ever.

    Where the compiler is here already, nothing is left out. In a process that was started so, Transformers' own tensor
    and expert parallelism and its masks by vmap cannot be used.
    """
    if _COMPILER in sys.modules:
        yield
        return
    import torch
    from transformers.utils import is_torch_distributed_available

    with mock.patch.object(torch.distributed, "is_available", lambda: False):
        is_torch_distributed_available()  # it keeps its first answer
    stand_ins = {name: _Marks(name) for name in (_COMPILER, _MASKS)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
