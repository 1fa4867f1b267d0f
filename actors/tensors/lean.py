"""Transformers' modelling code imported without torch's compiler and DTensor, which no rank uses: a third of its start.

When it is imported, Transformers marks functions for torch.compile and defines parallelism of its own. Both bring
hundreds of modules with them: over a second for each rank, also for one that takes the place of a lost one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from transformers.utils import is_torch_distributed_available

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
def compiler_left_out() -> Iterator[None]:
    """Import what builds models inside of this, first in a process. Afterwards the compiler can be imported as ever.

    Where the compiler is here already, nothing is left out. In a process that was started so, Transformers' own tensor
    and expert parallelism and its masks by vmap cannot be used.
    """
    if _COMPILER in sys.modules:
        yield
        return
    with mock.patch.object(torch.distributed, "is_available", lambda: False):
        is_torch_distributed_available()  # it keeps its first answer
    stand_ins = {name: _Marks(name) for name in (_COMPILER, _MASKS)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
