"""Loading: all shards together are the checkpoint, each reads its part once, and whatever is wrong is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.decisions.model.plan import Plan
from actors.tensors.model.skeleton import build_skeleton, config_digest, read_model_config
from actors.tensors.weights.checkpoint import boxes, find_sources, load_weights
from actors.tensors.weights.conversion import Conversions
from actors.tensors.weights.mapped import as_slices
from actors.tensors.weights.safetensors_index import read_header
from actors.words.errors import CheckpointError

FAMILIES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def load(checkpoints: Callable[[str], Path]) -> Callable[..., dict[str, torch.Tensor]]:
    """A rank's tensors by name, from a folder that need not hold the config."""
    made: dict[str, Conversions] = {}

    def load(plan: Plan, folder: Path, rank: int = 0, **more: Any) -> dict[str, torch.Tensor]:
        for family in FAMILIES:
            if family not in made:
                made[family] = Conversions(build_skeleton(read_model_config(checkpoints(family)), torch.float32))
        family = next(name for name in FAMILIES if config_digest(checkpoints(name)) == plan.spec.config_digest)
        shard = plan.shards[rank]
        dtype = getattr(torch, plan.spec.dtype)
        tensors = {tensor.name: torch.full(tensor.shape, float("nan"), dtype=dtype) for tensor in shard.tensors}
        report = load_weights(find_sources(folder, plan.spec, shard, made[family]), tensors, **more)
        assert report.bytes_copied == shard.weight_bytes
        assert report.computed == ()
        return tensors

    return load


@pytest.fixture
def copy(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(checkpoints(family), tmp_path / family))


def change(folder: Path, key: str, tensor: torch.Tensor | None, file: str | None = None) -> str:
    """Replace, add (in `file`) or drop a tensor; the index follows. Returns the file's name."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = file or index["weight_map"][key]
    tensors = load_file(folder / name)
    tensors.pop(key, None)
    index["weight_map"].pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
        index["weight_map"][key] = name
    save_file(tensors, folder / name)
    path.write_text(json.dumps(index))
    return str(name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_together_are_the_checkpoint(
    load: Any, plan_of: Any, checkpoints: Callable[[str], Path], family: str, tp: int, pp: int
) -> None:
    plan = plan_of(family, tp, pp)
    original = stored(checkpoints(family))
    whole = {key: torch.full_like(tensor, float("nan")) for key, tensor in original.items()}
    for rank, shard in enumerate(plan.shards):
        parameters = load(plan, checkpoints(family), rank)
        for tensor in shard.tensors:
            assert all(len(dim) == 1 for dim in tensor.intervals)
            place = tuple(slice(*dim[0]) for dim in tensor.intervals)
            already = whole[tensor.key][place]
            # Held twice (norms, replicated KV heads, a tied head): the same values
            assert torch.equal(torch.where(already.isnan(), parameters[tensor.name], already), parameters[tensor.name])
            whole[tensor.key][place] = parameters[tensor.name]
    for key, tensor in original.items():
        assert torch.equal(whole[key], tensor), key


def test_progress_ends_at_the_rank_s_own_bytes(load: Any, plan_of: Any, checkpoints: Callable[[str], Path]) -> None:
    said: list[tuple[int, int]] = []
    plan = plan_of("llama", 2, 2)
    load(plan, checkpoints("llama"), 3, progress=lambda done, total: said.append((done, total)))
    assert [done for done, _ in said] == sorted({done for done, _ in said})
    assert said[-1] == (plan.shards[3].weight_bytes, plan.shards[3].weight_bytes)


def test_dtype_is_converted(load: Any, plan_of: Any, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoints("llama_tied")
    save_file({key: tensor.bfloat16() for key, tensor in stored(folder).items()}, tmp_path / "model.safetensors")
    loaded = load(plan_of("llama_tied", 2), tmp_path, 1)
    name = "model.layers.3.mlp.down_proj.weight"
    assert loaded[name].dtype == torch.float32
    assert torch.equal(loaded[name], stored(folder)[name].bfloat16().float()[:, 48:])


def test_boxes_cover_every_element_once() -> None:
    intervals = (((2, 9), (20, 31)), ((5, 8),), ((0, 4),))
    source = torch.arange(40 * 10 * 4).view(40, 10, 4)
    target = torch.full((18, 3, 4), -1)
    for box, place in boxes(intervals):
        assert (target[place] == -1).all()
        target[place] = source[as_slices(box)]
    assert torch.equal(target, torch.cat([source[2:9], source[20:31]])[:, 5:8])


NORM = "model.layers.2.input_layernorm.weight"


def test_a_missing_tensor_is_named(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change(folder, NORM, None)
    with pytest.raises(CheckpointError, match=NORM):
        load(plan_of("llama"), folder)


def test_a_leftover_tensor_is_named_with_its_file(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = change(folder, NORM, torch.ones(64))
    change(folder, "model.layers.2.self_attn.q_proj.bias", torch.ones(64), file)
    with pytest.raises(CheckpointError, match=rf"{file} holds model.layers.2.self_attn.q_proj.bias"):
        load(plan_of("llama"), folder)


def test_ignorable_keys_are_left_out(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = change(folder, NORM, torch.full((64,), 2.0))
    change(folder, "model.layers.2.self_attn.rotary_emb.inv_freq", torch.ones(4), file)
    assert load(plan_of("llama"), folder)[NORM].eq(2.0).all()


def test_a_wrong_shape_is_named(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = change(folder, NORM, torch.ones(32))
    with pytest.raises(CheckpointError, match=rf"{file}: {NORM} is \[32\], but config.json asks for \[64\]"):
        load(plan_of("llama"), folder)


def test_a_quantized_tensor_is_refused(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change(folder, NORM, torch.ones(64).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=rf"{NORM} is stored as F8_E4M3; .*unquantized"):
        load(plan_of("llama"), folder)


def test_integers_do_not_become_weights(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change(folder, NORM, torch.ones(64, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=rf"{NORM} is stored as torch.int8, but the model holds torch.float32"):
        load(plan_of("llama"), folder)


@pytest.mark.parametrize("cut", [-1, 4, 40])
def test_a_truncated_file_is_named(load: Any, plan_of: Any, copy: Callable[[str], Path], cut: int) -> None:
    folder = copy("llama")
    file = folder / change(folder, NORM, torch.ones(64))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=file.name):
        load(plan_of("llama"), folder)


def test_a_missing_file_is_named(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = folder / change(folder, NORM, torch.ones(64))
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing"):
        load(plan_of("llama"), folder)


def test_a_stale_index_is_named(load: Any, plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = folder / change(folder, NORM, torch.ones(64))
    save_file({key: value for key, value in load_file(file).items() if key != NORM}, file)
    with pytest.raises(CheckpointError, match=rf"{file.name} holds no tensor {NORM}"):
        load(plan_of("llama"), folder)


@pytest.mark.parametrize("weight_map", [{"a": "../a.safetensors"}, {"a": "a.bin"}, "nonsense"])
def test_an_index_that_leads_elsewhere_is_refused(load: Any, plan_of: Any, tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index"):
        load(plan_of("llama"), tmp_path)


def test_an_empty_folder_is_named(load: Any, plan_of: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        load(plan_of("llama"), tmp_path)


def test_an_absurd_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header"):
        read_header(file)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 3)])
def test_a_tied_head_in_the_file_must_equal_the_embedding(
    load: Any, plan_of: Any, copy: Callable[[str], Path], tp: int, pp: int
) -> None:
    folder = copy("llama_tied")
    plan = plan_of("llama_tied", tp, pp)
    last = plan.topology.num_ranks - 1
    tensors = stored(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    load(plan, folder, last)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load(plan, folder, last)


@pytest.mark.parametrize("pp", [1, 2])
def test_a_tied_weight_may_be_stored_under_the_head_s_name(
    load: Any, plan_of: Any, copy: Callable[[str], Path], pp: int
) -> None:
    folder = copy("llama_tied")
    tensors = stored(folder)
    embedding = tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load(plan_of("llama_tied", 1, pp), folder)["model.embed_tokens.weight"], embedding)
