"""Reads config.json for Transformers' own classes, and lists what stands against serving the model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from actors.tensors.model.quantization import find_quantization, without_quantization
from actors.tensors.weights.ties import holds_own_head
from actors.words.errors import UnsupportedModel

_VERSION = f"Transformers {transformers.__version__}"
_NOT_RUN = "code from the checkpoint (auto_map) is never run"


@dataclass(frozen=True)
class ConfigReading:
    """What config.json, and the files beside it that say more of the weights, tell of a model."""

    config: PretrainedConfig | None  # without a word of quantization; None where Transformers cannot read it
    reasons: tuple[str, ...]  # why the checkpoint cannot be served, a line each
    notes: tuple[str, ...]  # what was read otherwise than it stands there
    dtype: str | None  # as it is named for the whole model, else for its text


def read_config_json(folder: Path) -> ConfigReading:
    """Read config.json; code from the checkpoint is never run. Raises ValueError when it is no JSON object."""
    raw = _load(folder / "config.json")
    reasons, notes = [], []
    if quantization := find_quantization(folder, raw):
        reasons.append(
            f"weights are quantized: {quantization.method} ({quantization.mark}), and only unquantized ones are "
            "served; use a checkpoint of this model in bfloat16"
        )
    prepared = _prepared(without_quantization(raw))
    model_type = _model_type(prepared)
    if model_type != raw.get("model_type"):
        notes.append(f"config.json is read as model type {model_type}, not {raw.get('model_type')}")
    config = None
    try:
        class_name = _own_class(model_type, raw)
        if "auto_map" in raw:
            notes.append(f"Transformers' own {class_name} is used: {_NOT_RUN}")
        config = _config(model_type, prepared)
        notes += _untied(config, folder)
    except UnsupportedModel as error:
        reasons.append(str(error))
    return ConfigReading(config, tuple(reasons), tuple(notes), _stated_dtype(raw))


def _load(path: Path) -> dict[str, Any]:
    """The keys of config.json, as Transformers decodes them."""
    try:
        if not isinstance(json.loads(path.read_bytes()), dict):
            raise TypeError("it is no JSON object")
        raw: dict[str, Any] = PretrainedConfig.get_config_dict(str(path.parent))[0]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"model.source: {path} cannot be read: {error}") from error
    return raw


def _own_class(model_type: str, raw: Mapping[str, Any]) -> str:
    """The name of Transformers' class for a config. Raises UnsupportedModel where it has none."""
    has_code = "auto_map" in raw
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"{_VERSION} has no model type {model_type} (config.json: model_type){f', and {_NOT_RUN}' * has_code}; "
            "use a model of a type that it has"
        )
    class_name = _class_name(model_type, raw.get("architectures"))
    if class_name is None:
        raise UnsupportedModel(
            f"{_VERSION} has no class that generates text for model type {model_type}; use another model"
        )
    if has_code and (foreign := _foreign_class(model_type, raw)) is not None:
        raise UnsupportedModel(
            f"{_VERSION} has no class {foreign} for model type {model_type} (config.json: architectures), and "
            f"{_NOT_RUN}; use a checkpoint of {class_name}"
        )
    return class_name


def _config(model_type: str, prepared: dict[str, Any]) -> PretrainedConfig:
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict({**prepared, "model_type": model_type})
    except Exception as error:  # whatever a family's class raises for values that it does not expect
        raise UnsupportedModel(
            f"{_VERSION} cannot read config.json as model type {model_type} ({in_short(error)}); mend the value"
        ) from error
    return config


def _untied(config: PretrainedConfig, folder: Path) -> list[str]:
    """Take out of a config that head and embedding are tied where the checkpoint has both → what is said of it."""
    parts = {id(part): part for part in (config, config.get_text_config(decoder=True))}.values()
    tied = [part for part in parts if getattr(part, "tie_word_embeddings", False)]
    if not tied or not holds_own_head(folder, getattr(config, "transformers_weights", None)):
        return []
    for part in tied:
        part.tie_word_embeddings = False
    return [
        "config.json ties the head to the embedding, but the checkpoint holds both, and they differ: they are not tied"
    ]


def auto_class(config: PretrainedConfig) -> Any:
    """Transformers' auto class that builds the model which config.json names."""
    name = _class_name(config.model_type, config.architectures)
    assert name is not None, "read_config_json has found a class"
    return _class_names(config.model_type)[name]


def causal_class_name(config: PretrainedConfig) -> str | None:
    """The causal class of a model type, such as that of a wrapper's text; None where it has none of its own."""
    return next((name for name, auto in _class_names(config.model_type).items() if auto is AutoModelForCausalLM), None)


def in_short(error: BaseException) -> str:
    """What caused an error, in one line of at most 100 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 80 else text[:77] + '...'}"


def _class_names(model_type: str) -> dict[str, Any]:
    """The classes that generate text for a model type: name → auto class; the causal ones first."""
    found: dict[str, Any] = {}
    for auto, names in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    ):
        of_type = names.get(model_type, ())
        for name in (of_type,) if isinstance(of_type, str) else of_type:
            found.setdefault(name, auto)
    return found


def _class_name(model_type: str, architectures: Any) -> str | None:
    """The class that `architectures` names, where it is one of the type's; else the first of the type."""
    known = _class_names(model_type)
    named = architectures if isinstance(architectures, list) else []
    return next((name for name in named if name in known), next(iter(known), None))


def _foreign_class(model_type: str, raw: Mapping[str, Any]) -> str | None:
    """The class of a checkpoint with code of its own, where it is not the model type's, however that is spelled."""
    named = raw.get("architectures")
    own = {_letters(name) for name in (*_class_names(model_type), f"{model_type}ForCausalLM")}
    wanted = named if isinstance(named, list) else []
    return next((str(name) for name in wanted if _letters(str(name)) not in own), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _model_type(raw: Mapping[str, Any]) -> str:
    """The model type by which Transformers is to read a config."""
    stated = str(raw.get("model_type"))
    if stated == "mistral" and "layer_types" in raw:  # AutoConfig's own rule
        return "ministral"
    is_plain = stated in CONFIG_MAPPING and "text_config" not in CONFIG_MAPPING[stated].sub_configs
    if is_plain and isinstance(raw.get("text_config"), dict):  # a wrapper that is named after its text
        named = raw.get("architectures") or ()
        wrappers = (one for one, name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items() if name in named)
        return next(wrappers, stated)
    return stated


def _prepared(raw: Any) -> Any:
    """A config without code, and with names that this Transformers knows: of dtypes, and of the rope type `su`."""
    if isinstance(raw, list):
        return [_prepared(value) for value in raw]
    if not isinstance(raw, dict):
        return raw
    prepared = {key: _prepared(value) for key, value in raw.items() if key != "auto_map"}
    for key in ("dtype", "torch_dtype"):
        if (name := _dtype_name(prepared.get(key))) is not None:
            prepared[key] = name if isinstance(getattr(torch, name, None), torch.dtype) else None
    for key in ("rope_type", "type"):
        if prepared.get(key) == "su":  # its name before it was longrope
            prepared[key] = "longrope"
    return prepared


def _stated_dtype(raw: Mapping[str, Any]) -> str | None:
    """The dtype that a config names for the whole model, else the one that it names for its text."""
    for key in ("dtype", "torch_dtype"):
        if (name := _dtype_name(raw.get(key))) is not None:
            return name
    of_text = (raw.get(key) for key in ("text_config", "thinker_config", "llm_config", "decoder"))
    return next((name for one in of_text if isinstance(one, dict) and (name := _stated_dtype(one))), None)


def _dtype_name(said: Any) -> str | None:
    """The name of a dtype, as torch spells it; None where there is none."""
    if isinstance(said, dict):  # one for each part of a model: the main one
        said = said.get("")
    return said.removeprefix("torch.") if isinstance(said, str) else None
