"""Builds the unsharded Transformers model as a skeleton: parameters on meta, buffers real."""

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama  # noqa: F401 - with it, what all model files import (remote/imports.py)

from actors.tensors.model.attention_layer import ATTENTION_NAME, transformers_attention
from actors.tensors.model.config_reader import auto_class, read_config_json
from actors.words.errors import UnsupportedModel

_patch_lock = threading.Lock()


def read_model_config(folder: Path) -> PretrainedConfig:
    """config.json as Transformers reads it; code from the checkpoint is never run.

    Raises UnsupportedModel with a line for each reason why it cannot be served, ValueError when the file is no JSON.
    """
    reading = read_config_json(folder)
    if reading.reasons or reading.config is None:
        raise UnsupportedModel("\n".join(reading.reasons))
    return reading.config


def config_digest(folder: Path) -> str:
    """A digest of what a config says of the model: without who saved it, and whatever the order of its keys."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    meant = {key: value for key, value in raw.items() if key not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()


def build_model(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, experts: str | None = None
) -> PreTrainedModel:
    """The model that generates text in eval mode; `attention` and `experts` name implementations (None: its own).

    Of a checkpoint that takes images or sound it is the whole one, which then gets token ids alone.
    """
    model = auto_class(config).from_config(
        config, attn_implementation=attention, experts_implementation=experts, dtype=dtype
    )
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole ForCausalLM in eval mode, attention going through `transformers_attention`.

    No memory is spent on parameters. Buffers (rotary frequencies) hold their real values, so that nothing has to be
    recomputed. No mask function is registered: masks are then None, and our attention applies the MaskSpec.
    """
    AttentionInterface.register(ATTENTION_NAME, transformers_attention)
    with parameters_on_meta():
        return build_model(config, dtype, ATTENTION_NAME)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """A context in which every parameter that a module registers goes to the meta device; buffers stay as they are."""
    with _patch_lock:
        register = nn.Module.register_parameter

        def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None:
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            register(module, name, param)

        nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
        try:
            with _LargeOnMeta():
                yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


class _LargeOnMeta(TorchFunctionMode):
    """Creates large tensors on the meta device: some models fill weights that are then never read.

    Tensors on the meta device are not filled: torch would import its compiler to do nothing.
    """

    _FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand})
    _LARGE = 1 << 20  # elements; buffers are smaller, and keep their values
    _FILL = frozenset({"normal_", "uniform_"})  # by name: torch's own, and those by which Transformers replaces them

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in self._FILL:
            tensor = args[0] if args else kwargs["tensor"]
            return tensor if tensor.is_meta else func(*args, **kwargs)
        size = args[0] if args and isinstance(args[0], Sequence) else args
        if func in self._FACTORIES and math.prod(size) > self._LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
