"""Finds by which method a checkpoint's weights are quantized, and which of its files says so."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json, and of the configs nested in it
# Files beside config.json: those of ModelOpt, AutoGPTQ and AutoAWQ; and how weights are quantized that have one
_FILES = {"hf_quant_config.json": "", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_INDEX = "model.safetensors.index.json"
# Ends of tensors' names that only quantized checkpoints have; the first that is found decides
_TENSORS = {
    ".weight_scale_2": "NVFP4",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8",
    "_blocks": "MXFP4",
    ".qweight": "GPTQ or AWQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
_IN_NAMES = re.compile(
    r"(?<![a-z0-9])(fp8|fp4|nvfp4|mxfp4|awq|gptq|int4|int8|w4a16|w8a8|w8a16|bnb|[48]bit)(?![a-z0-9])"
)
_METHODS = ("quant_method", "quant_algo", "quant_type", "method")


class Quantization(NamedTuple):
    """How weights are quantized."""

    method: str  # as people call it, e.g. FP8
    mark: str  # the file, and the key in it


def find_quantization(folder: Path, raw: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a checkpoint whose config.json holds `raw`; None where nothing says that there is one."""
    for path, said in _in_config(raw):
        return Quantization(_method(said), f"config.json: {path}")
    for name, method in _FILES.items():
        said = _read(folder / name)
        said = _entries(said.get("quantization", said))
        if said and (method or _algorithm(said)):
            return Quantization(_method(said) if _algorithm(said) else method, name)
    keys = _entries(_read(folder / _INDEX).get("weight_map"))
    for end, method in _TENSORS.items():
        key = next((key for key in keys if key.endswith(end)), None)
        if key is not None:
            return Quantization(method, f"{_INDEX}: {key}")
    return None


def method_in_name(source: str) -> str | None:
    """The method of quantization that the name of a model speaks of, e.g. FP8; a name proves nothing."""
    found = _IN_NAMES.search(source.rstrip("/").rpartition("/")[2].lower())
    return found[1].upper() if found else None


def without_quantization(raw: Any) -> Any:
    """What config.json holds, without a word of quantization: to see what else can be said of the model."""
    if not isinstance(raw, dict):
        return raw
    return {key: without_quantization(value) for key, value in raw.items() if key not in _KEYS}


def _in_config(raw: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each non-empty entry of a quantization, with its path."""
    for key, value in raw.items():
        if not isinstance(value, dict) or not value:
            continue
        if key in _KEYS:
            yield path + key, value
        else:
            yield from _in_config(value, f"{path}{key}.")


def _algorithm(said: Mapping[str, Any]) -> str:
    return next((str(said[key]) for key in _METHODS if said.get(key)), "")


def _method(said: Mapping[str, Any]) -> str:
    """The name of a method, with the number of bits where it does not say that already."""
    algorithm = str(said.get("quant_algo") or _algorithm(said) or "an unnamed method")
    bits = said.get("bits") or said.get("w_bit") or ("4" if said.get("load_in_4bit") else _bits_of_groups(said))
    name = algorithm if "-" in algorithm or algorithm in ("bitsandbytes", "an unnamed method") else algorithm.upper()
    return f"{name}, {bits} bits" if bits else name


def _bits_of_groups(said: Mapping[str, Any]) -> str:
    """The numbers of bits of compressed-tensors' groups."""
    weights = [_entries(_entries(group).get("weights")) for group in _entries(said.get("config_groups")).values()]
    return " and ".join(sorted({str(one["num_bits"]) for one in weights if "num_bits" in one}))


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none, or none that can be read."""
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return _entries(read)


def _entries(read: Any) -> dict[str, Any]:
    """What was read of a JSON object; nothing of anything else."""
    return read if isinstance(read, dict) else {}
