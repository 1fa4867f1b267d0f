"""Reads a checkpoint's config into a ModelSpec: sizes, parameters, styles and the window of every layer."""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from actors.decisions.model_spec import DTYPE_BYTES, LayerSpec, ModelSpec, Parameter
from actors.tensors.skeleton import build_skeleton, read_config
from actors.words.errors import UnsupportedModel


def read_spec(folder: Path, dtype: str = "auto") -> ModelSpec:
    """What the model in a folder is. `dtype` is config.model.dtype; "auto" takes config.json's.

    Raises UnsupportedModel or ValueError, each with the file and the remedy.
    """
    config = read_config(folder)
    resolved = resolve_dtype(config, dtype)
    return spec_of(build_skeleton(config, getattr(torch, resolved)), resolved)


def resolve_dtype(config: PretrainedConfig, dtype: str) -> str:
    """A key of DTYPE_BYTES. Raises ValueError when config.json does not settle it."""
    if dtype == "auto":
        asked = config.dtype
        dtype = "" if asked is None else str(asked).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(
            f"model.dtype: config.json says {dtype or 'nothing'}; set model.dtype to one of {', '.join(DTYPE_BYTES)}"
        )
    return dtype


def spec_of(model: PreTrainedModel, dtype: str) -> ModelSpec:
    """The facts of an unsharded skeleton."""
    config: Any = model.config
    tied = bool(config.tie_word_embeddings)
    head = "lm_head.weight"
    heads = config.num_attention_heads
    spec = ModelSpec(
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        dtype=dtype,
        tied_head=tied,
        layers=tuple(LayerSpec(window) for window in _windows(config)),
        parameters=tuple(
            Parameter(name, tuple(parameter.shape))
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not (tied and name == head)
        ),
        styles=dict(model.tp_plan),
    )
    _check(model, spec)
    return spec


def _windows(config: Any) -> list[int | None]:
    """The window of every layer, as Transformers' own mask functions would apply it."""
    layers = range(config.num_hidden_layers)
    window: int | None = getattr(config, "sliding_window", None)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    match config.model_type:
        case "llama":
            return [None for _ in layers]
        case "mistral":  # every layer, whatever layer_types says
            return [window for _ in layers]
        case "qwen2" | "qwen3":  # use_sliding_window and max_window_layers are already folded into these two
            assert kinds is not None
            unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
            if unknown or len(kinds) != len(layers):
                raise UnsupportedModel(
                    f"{config.model_type}: layer_types must name full_attention or sliding_attention for each of "
                    f"{len(layers)} layers; it has {len(kinds)} entries and names {', '.join(unknown) or 'no others'}"
                )
            if window is None and "sliding_attention" in kinds:
                raise UnsupportedModel(
                    f"{config.model_type}: layer_types names sliding_attention, but sliding_window is not in force; "
                    "set use_sliding_window and sliding_window in config.json"
                )
            return [window if kind == "sliding_attention" else None for kind in kinds]
    raise UnsupportedModel(f"{config.model_type}: no rule says which layers have a window")


def _check(model: PreTrainedModel, spec: ModelSpec) -> None:
    """What the shard plan takes for granted about names and shapes."""
    shapes = {parameter.name: parameter.shape for parameter in spec.parameters}
    embedding = f"{spec.embedding_name}.weight"
    assert shapes.get(embedding) == (spec.vocab_size, spec.hidden_size), embedding
    assert spec.tied_head or shapes.get(f"{spec.head_name}.weight") == (spec.vocab_size, spec.hidden_size)
    layers = model.get_submodule(spec.layers_name)
    assert isinstance(layers, torch.nn.ModuleList)
    assert len(layers) == spec.num_layers
