"""Odd checkpoints that do no harm: loaded as Transformers loads them, and what is odd is said once."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.decisions.model.plan import make_plan
from actors.tensors.model.skeleton import build_skeleton, config_digest, read_model_config
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.weights.checkpoint import boxes, find_sources, load_weights
from actors.tensors.weights.conversion import Conversions
from actors.tensors.weights.mapped import as_slices
from actors.tensors.weights.safetensors_index import stored_dtype, stored_tensors
from actors.words.errors import CheckpointError
from configs.config import Config

pytestmark = pytest.mark.timeout(30)

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.2"
NORM = f"{LAYER}.input_layernorm.weight"
JUNK = torch.arange(1.0, 5.0)


class Folder:
    """A checkpoint in several files, to make odd."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
        self.files = {file.name: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        self.first, *_, self.last = sorted(self.files)

    def hold(self, *keys: str, dtype: torch.dtype = torch.float32) -> None:
        """Store further tensors, and name them in the index."""
        self.files[self.first] |= {key: JUNK.to(dtype, copy=True) for key in keys}
        self.index |= dict.fromkeys(keys, self.first)

    def hold_a_layer_more(self) -> None:
        self.hold(*(key.replace(".2.", ".7.") for key in self.index if key.startswith(LAYER)))

    def drop_prefix(self) -> None:
        """As a base model is saved."""
        self.hold(f"{LAYER}.self_attn.rotary_emb.inv_freq", "model.layers.7.mlp.up_proj.weight")
        self.files = {
            name: {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
            for name, tensors in self.files.items()
        }
        self.index = {key.removeprefix("model."): name for key, name in self.index.items()}

    def hold_the_whole(self) -> None:
        """One file beside the others and their index, with other values."""
        whole = {key: tensor for tensors in self.files.values() for key, tensor in tensors.items()}
        self.files["model.safetensors"] = {**whole, NORM: whole[NORM] + 1}

    def save(self) -> Path:
        for name, tensors in self.files.items():
            save_file(tensors, self.path / name)
        (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.index}))
        return self.path


ODD: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "rotary table": (lambda f: f.hold(f"{LAYER}.self_attn.rotary_emb.inv_freq"), "left out, .*: .*inv_freq"),
    "table of cosines": (lambda f: f.hold(f"{LAYER}.self_attn.rotary_emb.cos_cached"), "left out, .*: .*cos_cached"),
    "buffer of today": (lambda f: f.hold("model.rotary_emb.inv_freq"), "left out, .*: model.rotary_emb.inv_freq"),
    "table that the index leaves out": (
        lambda f: (f.hold("model.rotary_emb.inv_freq"), f.index.pop("model.rotary_emb.inv_freq")),
        "does not name: model.rotary_emb.inv_freq; the files' headers are followed\nleft out",
    ),
    "weight that the index leaves out": (lambda f: f.index.pop(NORM), f"does not name: {NORM}; the files' headers"),
    "index names another file": (lambda f: f.index.update({NORM: f.last}), f"names the wrong file for: {NORM};"),
    "index names a tensor too much": (
        lambda f: f.index.update({"model.visual.weight": f.first}),
        "names what no file holds: model.visual.weight;",
    ),
    "heads": (
        lambda f: f.hold("v_head.summary.weight", "v_head.summary.bias", "score.weight", "classifier.weight"),
        r"left out, as LlamaForCausalLM .*: classifier.weight, score.weight, v_head.summary.bias, ... \(4 in all\)",
    ),
    "tower": (
        lambda f: f.hold("vision_tower.layers.0.self_attn.q_proj.bias", "multi_modal_projector.linear_1.weight"),
        "left out, .*: multi_modal_projector.linear_1.weight, vision_tower",
    ),
    "float8 tower in the base model": (
        lambda f: f.hold("model.visual.0.qkv.weight", dtype=torch.float8_e4m3fn),
        "left out, .*: model.visual",
    ),
    "layer beyond the last": (Folder.hold_a_layer_more, r"left out, .*: model.layers.7.* \(9 in all\)"),
    "names without prefix": (Folder.drop_prefix, "left out, .*: layers.2.*inv_freq, layers.7"),
    "whole model beside its parts": (
        Folder.hold_the_whole,
        "is read, as by Transformers, and not the files that .* names",
    ),
    "adapter": (lambda f: (f.path / "adapter_config.json").write_text("{}"), "names an adapter, which is not applied"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_does_no_harm_is_said_once(
    plan_of: Any, checkpoints: Callable[[str], Path], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_odd, words = ODD[name]
    folder = Folder(Path(shutil.copytree(checkpoints("llama"), tmp_path / "model")))
    make_odd(folder)
    path, plan = folder.save(), plan_of("llama", 2, 2)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    caplog.clear()
    conversions = Conversions(build_skeleton(read_model_config(path), torch.float32))
    for shard in plan.shards:
        tensors = {tensor.name: torch.empty(tensor.shape) for tensor in shard.tensors}
        load_weights(find_sources(path, plan.spec, shard, conversions), tensors)
        for tensor in shard.tensors:
            for box, part in boxes(tensor.intervals):
                assert torch.equal(tensors[tensor.name][part], expected[tensor.key][as_slices(box)]), tensor.name
    said = "\n".join(record.message for record in caplog.records if record.name.startswith("actors."))
    assert re.search(words, said), said
    assert said.count("left out") <= 1
    assert len(said) < 700


def test_config_may_have_fewer_layers_than_are_stored(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    plan = make_plan(Config.model_validate({"model": {"source": str(folder)}}), read_spec(folder))
    assert plan.spec.config_digest == config_digest(folder)
    conversions = Conversions(build_skeleton(read_model_config(folder), torch.float32))
    tensors = {tensor.name: torch.empty(tensor.shape) for tensor in plan.shards[0].tensors}
    load_weights(find_sources(folder, plan.spec, plan.shards[0], conversions), tensors)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


# Which files are read


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_the_config_may_name_the_weights(tmp_path: Path, name: str) -> None:
    for file, key in (("model.safetensors", "a"), ("other.safetensors", "b")):
        save_file({key: JUNK}, tmp_path / file)
    (tmp_path / "other.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "other.safetensors"}}))
    [stored] = stored_tensors(tmp_path, name).tensors
    assert (stored.key, stored.file.name) == ("b", "other.safetensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../model.safetensors", "is no safetensors file or index beside it"),
        (3, "is no safetensors file or index beside it"),
        ("model.bin", "is no safetensors file or index beside it"),
        ("other.safetensors", "is missing, though transformers_weights in config.json names it"),
    ],
)
def test_the_config_may_not_name_other_weights(tmp_path: Path, name: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        stored_tensors(tmp_path, name)


def test_shards_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    save_file({"a": JUNK}, tmp_path / "shards" / "1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "shards/1.safetensors"}}))
    assert [stored.key for stored in stored_tensors(tmp_path).tensors] == ["a"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link to a file that is not there"):
        stored_tensors(tmp_path)


def test_parts_without_an_index_are_named(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({str(number): JUNK}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"there is model-00001.* and 1 more; download"):
        stored_tensors(tmp_path)


def in_one_file(folder: Folder) -> None:
    folder.files = {folder.first: {key: one for tensors in folder.files.values() for key, one in tensors.items()}}
    folder.index = dict.fromkeys(folder.index, folder.first)


def mix(folder: Folder) -> None:
    """Other dtypes in each file, and first integers and float8, which say nothing."""
    for tensors, dtype in zip(folder.files.values(), (torch.float16, torch.bfloat16, torch.float32) * 9, strict=False):
        tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items()}
    folder.files[folder.first] |= {"a.table": JUNK.long(), "b.table": JUNK.to(torch.float8_e4m3fn)}
    folder.index |= {"a.table": folder.first, "b.table": folder.first}


def halve_one(folder: Folder) -> None:
    """By the order of the bytes in the file it is the last, by its name it is not."""
    in_one_file(folder)
    folder.files[folder.first]["lm_head.weight"] = folder.files[folder.first]["lm_head.weight"].half()


@pytest.mark.parametrize("said", [{}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("change", [in_one_file, mix, halve_one])
def test_stored_dtype_is_what_transformers_picks(
    checkpoints: Callable[[str], Path], tmp_path: Path, change: Callable[[Folder], None], said: dict[str, str]
) -> None:
    folder = Folder(Path(shutil.copytree(checkpoints("llama"), tmp_path / "model")))
    change(folder)
    folder.save()
    (folder.path / INDEX).write_text(json.dumps({"metadata": said, "weight_map": folder.index}))
    config = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps({**config, "dtype": None}))
    expected = AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto").dtype
    assert f"torch.{stored_dtype(folder.path)}" == str(expected)


def test_no_floating_dtype(tmp_path: Path) -> None:
    save_file({"a": JUNK.long()}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) is None
