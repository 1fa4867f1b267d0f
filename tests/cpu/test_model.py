"""From a checkpoint's name to a stage's model: sources, specs, what is refused, and what a rank is made of."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from actors.decisions.model.shard_plan import AttentionShard
from actors.decisions.model.sizes import Sizes
from actors.decisions.model.spec import AttentionSpec
from actors.tensors.attention.kv_cache import KVCache
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cpu.linear import OneDnnPackedLinear, linear_method
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.model.parallel_layers import RowwiseLinear, VocabParallelEmbedding, owns_weight, rebase
from actors.tensors.model.parallelize import parallelize
from actors.tensors.model.skeleton import build_skeleton, read_model_config
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.model.stage_model import build
from actors.tensors.runner import Runner
from actors.tensors.weights import source as source_module
from actors.tensors.weights.source import resolve_source
from actors.words.errors import CheckpointError, UnsupportedModel
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives.interface import LoneShard
from configs.config import ModelConfig

ATTENTION = ReferenceBackend(torch.device("cpu")).attention([], torch.float32, 16)  # nobody attends here

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)


class Alone:
    stage = LoneShard()
    previous = None
    next = None
    feedback = None


@pytest.fixture
def copy(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of one's own, keys of its config.json changed (None drops one)."""
    import json

    def make(family: str, **keys: Any) -> Path:
        folder = Path(shutil.copytree(checkpoints(family), tmp_path / family))
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **keys}
        dropped = {key for key, value in keys.items() if value is None}
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in dropped}))
        return folder

    return make


# Sources


def test_folders_are_found_from_the_project_s_root(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = checkpoints("llama")
    monkeypatch.setattr(source_module, "PROJECT_ROOT", folder.parent)
    monkeypatch.chdir(tmp_path)
    assert resolve_source(ModelConfig(source=str(folder))) == folder
    assert resolve_source(ModelConfig(source=folder.name)) == folder
    assert resolve_source(ModelConfig(source=f"./{folder.name}")) == folder


@pytest.fixture
def hub_cache(checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache that holds some-org/some-model at two revisions, and no way to the hub."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--some-org--some-model"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(checkpoints("llama"), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots"


def test_a_hub_id_is_served_from_the_local_cache(hub_cache: Path) -> None:
    assert resolve_source(ModelConfig(source="some-org/some-model")) == hub_cache / ("a" * 40)
    assert resolve_source(ModelConfig(source="some-org/some-model", revision="v2")) == hub_cache / ("b" * 40)


def test_later_ranks_load_the_commit_that_the_engine_found(hub_cache: Path) -> None:
    model = ModelConfig(source="some-org/some-model")
    found = read_spec(resolve_source(model)).revision
    assert found == "a" * 40
    (hub_cache.parent / "refs" / "main").write_text("b" * 40)  # somebody has pushed meanwhile
    assert resolve_source(model, found) == hub_cache / found != resolve_source(model)
    folder = ModelConfig(source=str(hub_cache / found))
    assert resolve_source(folder, read_spec(resolve_source(folder)).revision) == hub_cache / found


def test_a_hub_id_that_nobody_has_is_named(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.source: some-org/other-model .*cache"):
        resolve_source(ModelConfig(source="some-org/other-model"))
    with pytest.raises(ValueError, match=r"model\.revision 'v3'"):
        resolve_source(ModelConfig(source="some-org/some-model", revision="v3"))


def test_wrong_sources_are_named(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "other" / "pytorch_model.bin").touch()
    for name, words in (
        ("file", "is a file"),
        ("empty", "config.json"),
        ("other", "safetensors"),
        ("none", "no folder"),
    ):
        with pytest.raises(ValueError, match=rf"model\.source.*{words}"):
            resolve_source(ModelConfig(source=str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"model\.revision"):
        resolve_source(ModelConfig(source=str(checkpoints("llama")), revision="main"))


# Specs


def test_spec_of_llama(checkpoints: Callable[[str], Path]) -> None:
    spec = read_spec(checkpoints("llama"))
    assert (spec.architecture, spec.hidden_size, spec.vocab_size, spec.max_position) == (
        "LlamaForCausalLM",
        64,
        103,
        128,
    )
    assert spec.attentions[5] == AttentionSpec("model.layers.5.self_attn", 8, 4, 8, 8)
    assert Sizes.of(spec) == Sizes(7, frozenset({8}), frozenset({4}), frozenset({96}))
    assert (spec.dtype, spec.tied_head, spec.num_layers) == ("float32", False, 7)
    assert spec.style_of("model.layers.3.mlp.down_proj.weight") == "rowwise"
    assert spec.style_of("model.embed_tokens.weight") == "embedding_rowwise"
    assert spec.style_of("lm_head") == "colwise_gather_output"
    assert len(spec.parameters) == 3 + 7 * 9
    assert "lm_head.weight" not in {parameter.name for parameter in read_spec(checkpoints("llama_tied")).parameters}


def test_windows_are_resolved_layer_by_layer(copy: Callable[..., Path], checkpoints: Callable[[str], Path]) -> None:
    def windows(folder: Path) -> list[int | None]:
        return [attention.mask_spec.window for attention in read_spec(folder).attentions]

    assert windows(checkpoints("llama")) == [None] * 7
    assert windows(checkpoints("mistral")) == [5] * 7
    assert windows(checkpoints("qwen2")) == [None] * 3 + [6] * 4
    assert windows(copy("qwen3", sliding_window=9, use_sliding_window=False, layer_types=None)) == [None] * 7


def test_dtype_is_config_json_s_unless_asked(copy: Callable[..., Path]) -> None:
    folder = copy("llama", dtype="bfloat16")
    assert read_spec(folder).dtype == "bfloat16"
    assert read_spec(folder, "float16").dtype == "float16"
    with pytest.raises(ValueError, match=r"model\.dtype: config\.json says float64"):
        read_spec(copy("mistral", dtype="float64"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}, "architectures": ["OwnForCausalLM"]}, "auto_map"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_unsupported_models_are_named(copy: Callable[..., Path], keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        read_spec(copy("llama", **keys))


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_spec(tmp_path)


# What a rank is made of


def test_the_skeleton_has_meta_parameters_and_real_buffers(checkpoints: Callable[[str], Path]) -> None:
    model = build_skeleton(read_model_config(checkpoints("llama_tied")), torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(buffer.dtype == torch.float32 and buffer.isfinite().all() for buffer in buffers.values())
    assert not nn.Linear(2, 2).weight.is_meta, "the patch outlived the skeleton"


def test_a_rank_holds_its_part_and_nothing_else(plan_of: Any, checkpoints: Callable[[str], Path]) -> None:
    plan = plan_of("qwen2", 2, 3)
    for shard in plan.shards:
        stage = build(plan, shard.rank, checkpoints("qwen2"), LoneShard(), CPU, ATTENTION)
        parameters = stage.tensors()
        assert sum(parameter.nbytes for parameter in parameters.values()) == shard.weight_bytes
        assert len(stage.module.get_submodule("model.layers")) == 7
        assert ("model.embed_tokens.weight" in parameters) == (shard.stage == 0)
        assert ("model.norm.weight" in parameters) == ("lm_head.weight" in parameters) == (shard.stage == 2)


def test_a_tied_head_is_the_embedding_s_tensor(plan_of: Any, checkpoints: Callable[[str], Path]) -> None:
    plan = plan_of("llama_tied")
    module = build(plan, 0, checkpoints("llama_tied"), LoneShard(), CPU, ATTENTION).module
    assert module.get_parameter("lm_head.weight") is module.get_parameter("model.embed_tokens.weight")


def test_another_model_on_this_node_is_refused(
    plan_of: Any, copy: Callable[..., Path], checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of("mistral")
    with pytest.raises(ValueError, match=r"model\.source.*another model"):
        Runner(plan, 0, Alone(), CPUBackend(CPU)).load(copy("mistral", sliding_window=6))
    with pytest.raises(CheckpointError, match="safetensors"):
        empty = copy("qwen3")
        for file in empty.glob("*.safetensors*"):
            file.unlink()
        Runner(plan_of("qwen3"), 0, Alone(), CPUBackend(CPU)).load(empty)


def test_a_subclass_keeps_its_own_arithmetic() -> None:
    class ScaledEmbedding(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input) * 3

    class Halves(LoneShard):
        size = 2

    embedding = ScaledEmbedding(4, 2)
    ids = torch.tensor([[2, 0, 3]])
    expected = embedding(ids)
    parallelize(embedding, "embedding_rowwise", Halves(), (2, 4))
    embedding.weight = nn.Parameter(embedding.weight[2:4])
    assert isinstance(embedding, VocabParallelEmbedding)
    assert torch.equal(embedding(ids)[0, [0, 2]], expected[0, [0, 2]])
    assert embedding(ids)[0, 1].eq(0).all()


def test_a_rowwise_bias_is_added_once() -> None:
    class Twice(LoneShard):
        size = 2

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor * 2

    linear = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    expected = 2 * x @ linear.weight.T + linear.bias
    parallelize(linear, "rowwise", Twice(), (0, 0))
    assert isinstance(linear, RowwiseLinear)
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 40])
def test_a_packed_weight_multiplies_as_before(dtype: torch.dtype, num_rows: int) -> None:
    linear = rebase(nn.Linear(24, 10, dtype=dtype), RowwiseLinear).set_group(LoneShard())
    x = torch.randn(num_rows, 2, 48, dtype=dtype)[..., ::2]
    with torch.inference_mode():
        expected = linear(x)
        assert owns_weight(linear)
        method = linear_method([linear.weight])
        assert isinstance(method, OneDnnPackedLinear)
        linear.hand_over(method)
        assert linear.weight.numel() == 0
        torch.testing.assert_close(linear(x), expected)


def test_a_module_that_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Conv1d"):
        rebase(nn.Conv1d(2, 2, 1), RowwiseLinear)


# The runner alone


@pytest.fixture
def runner(plan_of: Any, checkpoints: Callable[[str], Path]) -> Runner:
    runner = Runner(plan_of("llama"), 0, Alone(), CPUBackend(CPU))
    runner.load(checkpoints("llama"))
    runner.allocate_cache(40)
    return runner


def step(entries: list[Entry], opened: tuple[int, ...] = (), closed: tuple[int, ...] = ()) -> StepBatch:
    return StepBatch(1, 1, 0, [NewSequence(seq, GREEDY, []) for seq in opened], list(closed), entries)


def ids_of(runner: Runner, batch: StepBatch) -> list[list[int]]:
    sampled = runner.execute(batch)
    assert sampled is not None
    return sampled.token_ids


def test_what_another_request_left_in_a_block_reaches_nobody(runner: Runner) -> None:
    first = ids_of(runner, step([Entry(1, 0, [5, 6, 7], [3], True)], opened=(1,)))
    assert runner.cache is not None
    for tensor in runner.cache.tensors:
        tensor.fill_(float("nan"))
    prefill = step([Entry(2, 0, [5, 6, 7], [3], True)], opened=(2,), closed=(1,))
    assert ids_of(runner, prefill) == first
    decode = ids_of(runner, step([Entry(2, 3, first[0], [], True)]))
    assert decode == ids_of(runner, step([Entry(4, 0, [5, 6, 7, *first[0]], [8], True)], opened=(4,)))


def test_a_chunk_that_is_not_the_last_samples_nothing(runner: Runner) -> None:
    assert ids_of(runner, step([Entry(1, 0, [5, 6], [3], False)], opened=(1,))) == []
    whole = ids_of(runner, step([Entry(2, 0, [5, 6, 7], [4], True)], opened=(2,)))
    assert ids_of(runner, step([Entry(1, 2, [7], [], True)])) == whole


def test_ids_come_in_the_order_of_the_entries(runner: Runner) -> None:
    prompts = [[1, 2, 3], [4], [5, 6], [7]]
    alone = [ids_of(runner, step([Entry(seq, 0, ids, [seq], True)], opened=(seq,))) for seq, ids in enumerate(prompts)]
    entries = [Entry(10 + seq, 0, ids, [10 + seq], True) for seq, ids in enumerate(prompts)]
    together = ids_of(runner, step(entries, opened=(10, 11, 12, 13)))
    assert together == [ids for answer in alone for ids in answer]
    assert len({tuple(ids) for ids in together}) > 1


def test_the_engine_s_mistakes_are_caught(runner: Runner) -> None:
    runner.execute(step([Entry(1, 0, [5, 6], [3], True)], opened=(1,)))
    with pytest.raises(AssertionError, match="open already"):
        runner.execute(step([], opened=(1,)))
    with pytest.raises(AssertionError, match="are missing"):
        runner.execute(step([Entry(1, 9, [5], [4], True)]))
    with pytest.raises(AssertionError, match="blocks do not hold"):
        runner.execute(step([Entry(1, 2, [5, 6, 7, 8], [], True)]))
    with pytest.raises(AssertionError, match="not known"):
        runner.execute(step([Entry(1, 9, [], [4, 5], True)]))
    with pytest.raises(KeyError):
        runner.execute(step([], closed=(99,)))


def test_many_sequences_may_be_open(runner: Runner) -> None:
    entries = [Entry(seq, 0, [seq], [seq], True) for seq in range(30)]
    together = ids_of(runner, step(entries, opened=tuple(range(30))))
    again = [ids_of(runner, step([Entry(100 + seq, 0, [seq], [seq], True)], (100 + seq,)))[0] for seq in (0, 13, 29)]
    assert again == [together[0], together[13], together[29]]


def test_sampling_is_repeatable_and_warm_up_leaves_no_trace(runner: Runner) -> None:
    def draw(seq: int, seed: int) -> list[list[int]]:
        opened = [NewSequence(seq, SamplingParams(2.0, seed), [])]
        return ids_of(runner, StepBatch(1, 1, 0, opened, [], [Entry(seq, 0, [1, 2, 3], [seq], True)]))

    first = [draw(seed, seed) for seed in range(12)]
    runner.warm_up()
    assert [draw(20 + seed, seed) for seed in range(12)] == first
    assert len({str(ids) for ids in first}) > 4
    assert all(seq >= 0 for seq in runner.table.rows)


def test_a_cache_too_small_for_one_sequence_is_refused(runner: Runner) -> None:
    with pytest.raises(ValueError, match=r"cache\.num_blocks: 19 .*takes 20"):
        runner.allocate_cache(19)


def test_the_longest_request_is_what_the_cache_holds_where_nobody_asked(
    plan_of: Any, checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of("llama", model={"max_model_len": None})
    assert plan.max_model_len == 128
    ids = []
    for num_blocks in (5, 40):  # of 4 tokens
        runner = Runner(plan, 0, Alone(), CPUBackend(CPU))
        runner.load(checkpoints("llama"))
        runner.allocate_cache(num_blocks)
        assert runner.plan.max_model_len == min(128, 4 * num_blocks)
        runner.warm_up()
        runner.join(Alone())  # another epoch
        assert runner.plan.max_model_len == min(128, 4 * num_blocks)
        ids.append(ids_of(runner, step([Entry(1, 0, list(range(20)), [0, 1, 2, 3, 4], True)], opened=(1,))))
    assert ids[0] == ids[1]
    with pytest.raises(AssertionError, match="blocks"):
        Runner.execute(runner, step([Entry(2, 0, list(range(20)), [0], True)], opened=(2,)))


def test_clearing_touches_only_the_named_blocks() -> None:
    shards = [AttentionShard(AttentionSpec("", 1, 1, 2, 3), (0, 1), (0, 1))] * 2
    cache = KVCache(shards, 4, 3, torch.float32, CPU)
    for tensor in cache.tensors:
        tensor.fill_(1)
    cache.clear(torch.tensor([2, 0]))
    for tensor in cache.tensors:
        assert tensor[[0, 2]].eq(0).all()
        assert tensor[[1, 3]].eq(1).all()


def test_unknown_keys_of_a_transformers_config_do_not_matter(copy: Callable[..., Path]) -> None:
    folder = copy("llama", some_note="kept by whoever exported it")
    assert AutoConfig.from_pretrained(folder).some_note
    assert read_spec(folder).num_layers == 7
