"""What checkpoints hold too much: tensors that no answer depends on, and tensors of a model that computes more."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from actors.decisions.model.spec import ModelSpec
from actors.tensors.weights.conversion import Conversions

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def stored_in(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def rewrite(folder: Path, tensors: Tensors) -> None:
    """Replace the weights of a checkpoint: one file, and an index to which junk can be added."""
    for file in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
        file.unlink()
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / "weights.safetensors")
    add(folder, tensors, {})


def add(folder: Path, tensors: Tensors, junk: Tensors) -> None:
    """Put junk beside the weights, in a file of its own; the junk before goes."""
    save_file({key: tensor.clone().contiguous() for key, tensor in junk.items()}, folder / "junk.safetensors")
    weight_map = dict.fromkeys(tensors, "weights.safetensors") | dict.fromkeys(junk, "junk.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def harmless(stored: Tensors, spec: ModelSpec, conversions: Conversions) -> dict[str, Tensors]:
    """Junk that may be left out, by its kind."""
    trunk, hidden = spec.layers_name.rpartition(".")[0], spec.hidden_size
    last, beyond = f"{spec.layers_name}.{spec.num_layers - 1}.", f"{spec.layers_name}.{spec.num_layers}."
    kinds = {
        "heads": {
            "v_head.summary.weight": torch.randn(1, hidden),
            "v_head.summary.bias": torch.randn(1),
            "score.weight": torch.randn(2, hidden),
        },
        "towers": {
            "sound_tower.encoder.layers.0.self_attn.q_proj.weight": torch.randn(4, 4),
            "sound_projector.linear_1.weight": torch.randn(hidden, 4),
            f"{trunk}.sound.blocks.0.attn.qkv.weight": torch.randn(4, 4),
        },
        "layers beyond the last": {
            _renumbered(key, spec.num_layers - 1): tensor
            for key, tensor in stored.items()
            if conversions.target_of(key)[0].startswith(last)
        },
    }
    assert all(conversions.target_of(key)[0].startswith(beyond) for key in kinds["layers beyond the last"])
    if any(name.endswith("inv_freq") for name in conversions.structure.computed):
        parents = {key.rpartition(".")[0].rpartition(".")[0] for key in stored if ".0." in key}
        kinds["rotary tables"] = {
            f"{parent}.rotary_emb.{table}": torch.randn(4) for parent in parents for table in ("inv_freq", "cos_cached")
        }
    return kinds


def harmful(stored: Tensors, spec: ModelSpec, conversions: Conversions) -> dict[str, str]:
    """Keys that must not be left out, by kind; each lies in a module that the model has."""
    names = {conversions.target_of(key)[0]: key for key in stored if conversions.target_of(key)[1] is None}
    plain = {name.removesuffix(".weight"): key for name, key in names.items() if name.endswith(".weight")}
    state, first = conversions.structure.state, f"{spec.layers_name}.0."
    in_layer = {name: key.removesuffix("weight") for name, key in plain.items() if name.startswith(first)}
    kinds = {}
    for name, key in in_layer.items():
        if f"{name}.bias" not in state:
            kinds[f"bias of {name}"] = f"{key}bias"
        kinds[f"scale of {name}"] = f"{key}weight_scale"
        parent, own = key.removesuffix(".").rpartition(".")[0], name.rpartition(".")[0]
        if f"{own}.extra_norm.weight" not in state:
            kinds[f"norm in {own}"] = f"{parent}.extra_norm.weight"
    for key in stored:
        target, pattern = conversions.target_of(key)
        if pattern is not None and target.startswith(first) and conversions.target_of(f"{key}_scale")[0] not in state:
            kinds[f"scale of a part of {target}"] = f"{key}_scale"
    if spec.head_name in plain and f"{spec.head_name}.bias" not in state:
        kinds["bias of the head"] = f"{plain[spec.head_name].removesuffix('weight')}bias"
    kinds["norm of the embedding"] = f"{spec.layers_name.rpartition('.')[0]}.embed_layernorm.weight"
    kinds["a parameter of the model"] = "residual_scales"
    return kinds


def _renumbered(key: str, number: int) -> str:
    """The key of the next layer's tensor."""
    return key.replace(f".{number}.", f".{number + 1}.", 1)
