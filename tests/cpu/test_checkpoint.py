"""Loading: all shards together are the checkpoint, each reads its part once, and whatever is wrong is named."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.decisions.plan import Plan
from actors.tensors.checkpoint import load_weights, pieces, read_header
from actors.words.errors import CheckpointError

FAMILIES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")
IGNORABLE = [r"rotary_emb\.inv_freq"]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def load(plan: Plan, folder: Path, rank: int = 0, **more: Any) -> dict[str, torch.Tensor]:
    shard = plan.shards[rank]
    dtype = getattr(torch, plan.spec.dtype)
    parameters = {tensor.name: torch.full(tensor.shape, float("nan"), dtype=dtype) for tensor in shard.tensors}
    report = load_weights(folder, plan.spec, shard, parameters, IGNORABLE, **more)
    assert report.bytes_copied == shard.weight_bytes
    return parameters


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
    plan_of: Any, checkpoints: Callable[[str], Path], family: str, tp: int, pp: int
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


def test_progress_ends_at_the_rank_s_own_bytes(plan_of: Any, checkpoints: Callable[[str], Path]) -> None:
    said: list[tuple[int, int]] = []
    plan = plan_of("llama", 2, 2)
    load(plan, checkpoints("llama"), 3, progress=lambda done, total: said.append((done, total)))
    assert [done for done, _ in said] == sorted({done for done, _ in said})
    assert said[-1] == (plan.shards[3].weight_bytes, plan.shards[3].weight_bytes)


def test_dtype_is_converted(plan_of: Any, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoints("llama_tied")
    save_file({key: tensor.bfloat16() for key, tensor in stored(folder).items()}, tmp_path / "model.safetensors")
    loaded = load(plan_of("llama_tied", 2), tmp_path, 1)
    name = "model.layers.3.mlp.down_proj.weight"
    assert loaded[name].dtype == torch.float32
    assert torch.equal(loaded[name], stored(folder)[name].bfloat16().float()[:, 48:])


def test_pieces_are_small_and_cover_every_element_once() -> None:
    intervals = (((2, 9), (20, 31)), ((5, 8),), ((0, 4),))
    source = torch.arange(40 * 10 * 4).view(40, 10, 4)
    target = torch.full((18, 3, 4), -1)
    for source_slices, target_slices in pieces(intervals, 8, piece_bytes=3 * 12 * 8):
        part = source[source_slices]
        assert part.shape[0] <= 3
        assert (target[target_slices] == -1).all()
        target[target_slices] = part
    expected = torch.cat([source[2:9], source[20:31]])[:, 5:8]
    assert torch.equal(target, expected)
    assert math.prod(target.shape) == len(set(target.flatten().tolist()))


NORM = "model.layers.2.input_layernorm.weight"


def test_a_missing_tensor_is_named(plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change(folder, NORM, None)
    with pytest.raises(CheckpointError, match=NORM):
        load(plan_of("llama"), folder)


def test_a_leftover_tensor_is_named_with_its_file(plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = change(folder, NORM, torch.ones(64))
    change(folder, "model.layers.2.self_attn.q_proj.bias", torch.ones(64), file)
    with pytest.raises(CheckpointError, match=rf"{file} holds model.layers.2.self_attn.q_proj.bias"):
        load(plan_of("llama"), folder)


def test_ignorable_keys_are_left_out(plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = change(folder, NORM, torch.full((64,), 2.0))
    change(folder, "model.layers.2.self_attn.rotary_emb.inv_freq", torch.ones(4), file)
    assert load(plan_of("llama"), folder)[NORM].eq(2.0).all()


def test_a_wrong_shape_is_named(plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = change(folder, NORM, torch.ones(32))
    with pytest.raises(CheckpointError, match=rf"{file}: {NORM} is \[32\], but config.json asks for \[64\]"):
        load(plan_of("llama"), folder)


def test_a_quantised_tensor_is_refused(plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change(folder, NORM, torch.ones(64, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=rf"{NORM} is stored as I8"):
        load(plan_of("llama"), folder)


@pytest.mark.parametrize("cut", [-1, 4, 40])
def test_a_truncated_file_is_named(plan_of: Any, copy: Callable[[str], Path], cut: int) -> None:
    folder = copy("llama")
    file = folder / change(folder, NORM, torch.ones(64))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=file.name):
        load(plan_of("llama"), folder)


def test_a_missing_file_is_named(plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = folder / change(folder, NORM, torch.ones(64))
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing"):
        load(plan_of("llama"), folder)


def test_a_stale_index_is_named(plan_of: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    file = folder / change(folder, NORM, torch.ones(64))
    save_file({key: value for key, value in load_file(file).items() if key != NORM}, file)
    with pytest.raises(CheckpointError, match=rf"{file.name} holds no tensor {NORM}"):
        load(plan_of("llama"), folder)


@pytest.mark.parametrize("weight_map", [{"a": "../a.safetensors"}, {"a": "a.bin"}, "nonsense"])
def test_an_index_that_leads_elsewhere_is_refused(plan_of: Any, tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index"):
        load(plan_of("llama"), tmp_path)


def test_an_empty_folder_is_named(plan_of: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        load(plan_of("llama"), tmp_path)


def test_an_absurd_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header"):
        read_header(file)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 3)])
def test_a_tied_head_in_the_file_must_equal_the_embedding(
    plan_of: Any, copy: Callable[[str], Path], tp: int, pp: int
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
def test_a_tied_weight_may_be_stored_under_the_head_s_name(plan_of: Any, copy: Callable[[str], Path], pp: int) -> None:
    folder = copy("llama_tied")
    tensors = stored(folder)
    embedding = tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load(plan_of("llama_tied", 1, pp), folder)["model.embed_tokens.weight"], embedding)
