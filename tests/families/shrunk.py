"""Tiny configs of published ones: every switch as published, sizes smaller, layers as many as have every kind.

What is kept: kinds of layers and their order, windows on or off, rotary embeddings, biases, norms, layouts of experts,
groups of experts, ties, caps, multipliers, the ratio of heads to KV heads, and equal sizes where sizes are equal.
"""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from actors.decisions.model.spec import ModelSpec

PUBLISHED = Path(__file__).parent.parent / "data" / "published"  # a folder for each
MORE: dict[str, Any] = json.loads(PUBLISHED.with_name("more_published.json").read_text())
NAMES = sorted({*MORE, *(folder.name for folder in PUBLISHED.iterdir() if folder.is_dir())})

VOCABULARY = 103
WINDOW = 6  # tokens, shorter than the prompts
LENGTH = 16  # tokens after which attention is scaled by the position

HEAD_SIZES = (
    "head_dim",
    "attention_head_dim",
    "global_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "qk_head_dim",
    "v_head_dim",
    "rotary_dim",
    "mamba_d_head",
)
RANKS = ("kv_lora_rank", "q_lora_rank")
WIDTHS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
WINDOWS = ("sliding_window", "attention_chunk_size")
SIZES = {
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "num_hidden_layers",
    "n_group",
    "topk_group",
    "floor_scale",
    *HEAD_SIZES,
    *RANKS,
    *WIDTHS,
    *EXPERTS,
    *CHOSEN,
    *VOCABULARIES,
    *WINDOWS,
}
TOWER = {  # of what sees images, beside the text
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}


def published(name: str) -> dict[str, Any]:
    """A published config, without its quantization."""
    raw: dict[str, Any] = (
        copy.deepcopy(MORE[name]) if name in MORE else json.loads((PUBLISHED / name / "config.json").read_text())
    )
    for config in (raw, raw.get("text_config", {})):
        config.pop("quantization_config", None)
    return raw


def families_of(name: str) -> list[str]:
    """The model types of a published config: the whole one's, and its text part's."""
    raw = published(name)
    return [one["model_type"] for one in (raw, raw.get("text_config", {})) if "model_type" in one]


def shrunk(raw: dict[str, Any], config: PretrainedConfig, spec: ModelSpec) -> dict[str, Any]:
    """The tiny config; `config` and `spec` are what we read of the published one."""
    small = copy.deepcopy(raw)
    small["model_type"] = config.model_type  # where it was named after its text, which Transformers does not read
    text = small.get("text_config", small)
    _fill(text, type(config.get_text_config(decoder=True)), SIZES)
    hidden_size = _shrink_text(text)
    _cut_layers(text, _num_layers_of_every_kind(spec, config))
    for name in ("vision_config", "audio_config"):
        if getattr(config, name, None) is not None:
            tower = small[name] = small.get(name) or {}
            _shrink_tower(tower, type(getattr(config, name)), hidden_size)
    for part in (small, text):
        for key in [key for key in part if key.endswith(("_token_id", "_token_index"))]:
            part[key] = _each(part[key], lambda number: min(number, VOCABULARY - 1))
        part.pop("torch_dtype", None)
        part["dtype"] = "float32"
    return small


def _shrink_text(text: dict[str, Any]) -> int:
    """Make the sizes of the text part small, in place; returns the hidden size."""
    heads, hidden_size = text["num_attention_heads"], text["hidden_size"]
    kv_heads = text.get("num_key_value_heads") or heads
    ratio = heads // kv_heads
    new_kv_heads = 1 if kv_heads == 1 else 4 if ratio == 1 else 2
    new_heads = new_kv_heads * (ratio if ratio <= 5 else 4)
    new_hidden_size = math.ceil(hidden_size * new_heads / heads / 32) * 4
    groups = min(text.get("n_group") or 1, 4)
    rules: dict[str, Any] = {
        **dict.fromkeys(HEAD_SIZES, lambda size: size // 8),
        **dict.fromkeys(RANKS, lambda size: size // 16),
        **dict.fromkeys(WIDTHS, lambda size: math.ceil(size * new_hidden_size / hidden_size / 8) * 8),
        **dict.fromkeys(EXPERTS, lambda count: min(count, 8)),
        **dict.fromkeys(CHOSEN, lambda count: min(count, 3)),
        **dict.fromkeys(VOCABULARIES, lambda size: VOCABULARY),
        **dict.fromkeys(WINDOWS, lambda size: WINDOW),
        "num_attention_heads": lambda count: new_heads,
        "num_key_value_heads": lambda count: new_kv_heads,
        "num_global_key_value_heads": lambda count: max(1, count * new_kv_heads // kv_heads),
        "hidden_size": lambda size: new_hidden_size,
        "hidden_size_per_layer_input": lambda size: min(size, 8),
        "n_group": lambda count: groups,
        "topk_group": lambda count: min(count, max(1, groups // 2)),
        "floor_scale": lambda length: LENGTH,
        "mamba_n_heads": lambda count: count * 8 * new_hidden_size // hidden_size,
    }
    for key in text.keys() & rules.keys():
        text[key] = _each(text[key], rules[key])
    for key in ("rope_scaling", "rope_parameters"):
        for rope in _ropes(text.get(key)):
            _shrink_rope(rope)
    return new_hidden_size


def _ropes(value: Any) -> Iterator[dict[str, Any]]:
    """The settings of a rotary embedding, or of each kind of layer."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _ropes(inner)


def _shrink_rope(rope: dict[str, Any]) -> None:
    for key in ("short_factor", "long_factor"):
        if key in rope:
            rope[key] = rope[key][::8]
    if "mrope_section" in rope:
        ends = [sum(rope["mrope_section"][: index + 1]) // 8 for index in range(len(rope["mrope_section"]))]
        rope["mrope_section"] = [end - first for first, end in zip([0, *ends], ends, strict=False)]
    if "llama_4_scaling_beta" in rope:
        rope["original_max_position_embeddings"] = LENGTH


def _num_layers_of_every_kind(spec: ModelSpec, config: PretrainedConfig) -> int:
    """The shortest run of first layers that has every kind; at least three, which are dealt unevenly to two stages."""
    text = config.get_text_config(decoder=True).to_dict()
    lists = [one for one in text.values() if isinstance(one, list) and len(one) == spec.num_layers]
    shapes: list[list[Any]] = [[] for _ in spec.layers]
    for parameter in spec.parameters:
        number = spec.layer_of(parameter.name)
        if number is not None:
            shapes[number].append((parameter.name.split(f".{number}.", 1)[1], parameter.shape))
    kinds = [
        repr(
            (
                sorted(shapes[number]),
                [(one.num_kv_heads, one.key_dim, one.mask_spec) for one in layer.attentions],
                [one[number] for one in lists],
            )
        )
        for number, layer in enumerate(spec.layers)
    ]
    return max(3, *(kinds.index(kind) + 1 for kind in kinds))


def _cut_layers(text: dict[str, Any], num_layers: int) -> None:
    whole = text["num_hidden_layers"]
    for key, value in text.items():
        if isinstance(value, list) and len(value) == whole:
            text[key] = value[:num_layers]
    text["num_hidden_layers"] = num_layers


def _shrink_tower(tower: dict[str, Any], family: type[PretrainedConfig], text_hidden_size: int) -> None:
    patch = tower.get("patch_size") or 14
    sizes = {**TOWER, "out_hidden_size": text_hidden_size, "image_size": 4 * patch, "patch_size": patch}
    tower.setdefault("model_type", family.model_type)
    _fill(tower, family, set(sizes))
    for key in tower.keys() & sizes.keys():
        if tower[key] is not None:
            tower[key] = sizes[key]


def _fill(config: dict[str, Any], family: type[PretrainedConfig], names: set[str]) -> None:
    """Write down the sizes that a config leaves to its family, in place."""
    aliases = {name for alias, name in (family.attribute_map or {}).items() if alias in config}
    for name in names - config.keys() - aliases:
        default = getattr(family, name, None)
        if isinstance(default, int) and not isinstance(default, bool):
            config[name] = default


def _each(value: Any, change: Any) -> Any:
    """A number changed, or each one of a list; what is no number, or 0, stays."""
    if isinstance(value, list):
        return [_each(one, change) for one in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value
