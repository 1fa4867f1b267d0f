"""Finds, for every family with a tensor-parallel plan, settings of its config that are not neutral and take effect.

Tries every switch, multiplier, cap and scale of a config on a tiny model, and keeps what changes the logits. Writes
settings.json beside this file; run it again when Transformers is updated: `python tests/families/find_settings.py`.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent))

from tiny import SIZES, make_config, make_model

SETTINGS = Path(__file__).with_name("settings.json")
IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 17, 60, 2, 31, 77, 54, 8, 19, 90, 33, 21, 4, 66, 12]])

# What the search cannot guess: sizes that must fit each other, lists by layer, caps that are None by default.
GIVEN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("given.json").read_text())

# Nothing of a forward pass depends on these, or they choose another model than the one that is served.
LEFT_ALONE = (
    "dropout",
    "use_cache",
    "output_",
    "return_dict",
    "initializer",
    "_std",
    "loss",
    "aux",
    "jitter",
    "tie_word",
    "is_decoder",
    "is_encoder",
    "cross_attention",
    "chunk_size_feed",
    "pretraining_tp",
    "mtp",
    "nextn",
    "_eps",
    "quant",
    "is_causal",
    "bidirectional",
    "is_first",
    "torchscript",
    "scale_fmt",
    "num_",
    "_id",
)
CAPS = {"clip_qkv": 0.8, "softcap": 3.0, "logit_cap": 3.0, "clamp": 0.9, "limit": 0.9}


def families() -> list[str]:
    """Model types of all causal families whose config carries a plan; those that see are served for text alone."""
    planned = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if plan_of(name)]
    return [name for name in planned if name in GIVEN or "text_config" not in (CONFIG_MAPPING[name].sub_configs or {})]


def plan_of(model_type: str) -> dict[str, str] | None:
    """The tensor-parallel plan of a family, as its config has it."""
    try:
        plan: dict[str, str] | None = CONFIG_MAPPING[model_type].base_model_tp_plan
    except (KeyError, AttributeError):
        return None
    return plan


def logits(model_type: str, changes: dict[str, Any]) -> torch.Tensor:
    """Of a tiny model's last tokens."""
    model = make_model(make_config(model_type, changes))
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits[0]


def proposals(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values that are not neutral."""
    if "text_config" in config:
        return  # all is given
    for name, value in config.items():
        if any(part in name for part in LEFT_ALONE) or name in SIZES or name.startswith("_"):
            continue
        cap = next((cap for part, cap in CAPS.items() if part in name), None)
        is_scale = isinstance(value, float) or name.endswith(
            ("_multiplier", "_scale", "_scaling", "_factor", "_scalar")
        )
        if value is False or name == "norm_topk_prob":
            yield name, not value
        elif cap is not None and not isinstance(value, bool):
            yield name, cap
        elif is_scale and isinstance(value, int | float) and value is not True:
            yield name, 0.7 if value in (0, 1) else type(value)(value * 0.6)
        elif name == "layer_types" and value and set(value) <= {"sliding_attention", "full_attention"}:
            yield (
                name,
                ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            )
        elif name == "rope_parameters" and value and "rope_type" in value:
            yield name, {**value, "rope_theta": 300.0, "partial_rotary_factor": 0.5}
            yield name, {**value, "rope_theta": 300.0}


def search(model_type: str) -> dict[str, Any]:
    """The changes that take effect, one upon the other."""
    changes = dict(GIVEN.get(model_type, {}))
    before = logits(model_type, changes)
    for name, value in proposals(make_config(model_type, changes).to_dict()):
        if name in changes:
            continue
        try:
            after = logits(model_type, {**changes, name: value})
        except Exception:
            continue
        if after.shape == before.shape and after.isfinite().all() and (after - before).abs().max() > 1e-4:
            changes[name], before = value, after
    return changes


def main() -> None:
    """Write settings.json; families whose tiny model cannot be made are named."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    asked = sys.argv[1:]
    found = json.loads(SETTINGS.read_text()) if asked and SETTINGS.exists() else {}
    for model_type in asked or sorted({*families(), *GIVEN}):
        try:
            found[model_type] = search(model_type)
            print(model_type, found[model_type], flush=True)
        except Exception as error:
            print(model_type, "cannot be made:", type(error).__name__, str(error)[:300], flush=True)
    SETTINGS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
