"""Tiny random checkpoints of any family: few layers, odd sizes, every tensor random, nothing neutral."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from actors.tensors.model.config_reader import auto_class

# Sizes, where a family's config has them. Heads are fewer than would be square, vocabularies odd, windows shorter than
# the prompts, and five layers cannot be dealt evenly to two stages.
SIZES: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 10,
    "first_k_dense_replace": 2,
}


def make_config(model_type: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """A family's config: tiny, and changed. A value of `changes` that is None leaves the family's own default."""
    family = CONFIG_MAPPING[model_type]
    default = family().to_dict()
    sizes = {name: size for name, size in SIZES.items() if default.get(name) is not None or name.endswith("_id")}
    if default.get("num_key_value_heads") == default.get("num_attention_heads"):
        sizes.pop("num_key_value_heads", None)
        sizes |= {"num_key_value_heads": 4} if "num_key_value_heads" in default else {}
    if "qk_rope_head_dim" in default:  # latent attention: heads have two parts, and what is called head_dim follows
        sizes.pop("head_dim", None)
    wanted = {**sizes, **changes}
    return family(**{name: value for name, value in wanted.items() if value is not None})


def read_config(folder: Path) -> PreTrainedConfig:
    """A folder's config.json as Transformers reads it."""
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, PreTrainedConfig)
    return config


def write_config(raw: dict[str, Any], folder: Path) -> None:
    """Write a folder's config.json."""
    (folder / "config.json").write_text(json.dumps(raw))


def load_model(folder: Path) -> Any:
    """A checkpoint as Transformers loads it: in fp32, attention written out."""
    auto = auto_class(read_config(folder))
    return auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def make_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """The model in fp32, attention written out, every tensor of its state random."""
    model: Any = auto_class(config).from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(_random(name, tensor.shape, generator))
    return model


def save(model: Any, folder: Path) -> None:
    """As users have it on disk: original names and layouts, in several files."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.save_pretrained(folder, max_shard_size="60KB")


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if "q_norm" in name or "k_norm" in name:  # attention that is not so peaked that it blows up rounding
        return noise * 0.15 + 0.5
    if len(shape) < 2:
        return noise * 0.3 + ("norm" in name)
    if "embed" in name or "lm_head" in name:
        return noise * 0.3
    return noise * 0.8 * shape[-1] ** -0.5
