"""Builds the unsharded Transformers model as a skeleton: parameters on meta, buffers real."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from actors.tensors.attention import ATTENTION_NAME, paged_attention
from actors.words.errors import UnsupportedModel

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Fixed once from the config. `dynamic` and `longrope` look at the largest position of the whole packed batch, so that
# one long request would change the others.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_patch_lock = threading.Lock()


def read_config(folder: Path) -> PretrainedConfig:
    """config.json as Transformers reads it, code from the checkpoint never run.

    Raises UnsupportedModel by name for what cannot be served correctly, ValueError when the file cannot be read.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"model.source: {path} cannot be read: {error}") from error
    architecture = ", ".join(raw.get("architectures") or []) or "no architecture"
    if "auto_map" in raw:
        raise UnsupportedModel(f"{architecture}: {path} needs code from the checkpoint (auto_map), which is never run")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModel(
            f"{architecture} in {path} is not supported yet; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if raw.get("quantization_config"):
        raise UnsupportedModel(f"{architecture}: {path} names a quantization_config; use the unquantised checkpoint")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.source: {path} cannot be read by Transformers: {error}") from error
    assert isinstance(config, PretrainedConfig)
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedModel(
            f"{architecture}: rope_type {rope_type!r} in {path} depends on the longest sequence of a batch; "
            f"supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    return config


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole ForCausalLM in eval mode, attention going through `paged_attention`.

    No memory is spent on parameters. Buffers (rotary frequencies) hold their real values, so that nothing has to be
    recomputed. No mask function is registered: masks are then None, and the layer's window is honoured by us.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While it lasts, every parameter that a module registers goes to the meta device; buffers are left alone."""
    with _patch_lock:
        register = nn.Module.register_parameter

        def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None:
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            register(module, name, param)

        nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
