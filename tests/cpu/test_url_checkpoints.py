"""A checkpoint at a URL: a node reads the bytes of its stages and no others, and what it computes is the folder's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.decisions.model.plan import Plan, make_plan
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.model.stage_model import build
from actors.tensors.verify.reference import Reference
from actors.tensors.weights import source as source_module
from actors.tensors.weights.checkpoint import load_weights
from actors.tensors.weights.safetensors_index import stored_tensors
from actors.tensors.weights.source import resolve_source
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives.interface import LoneShard
from configs.config import Config, ModelConfig
from deployments.cli import main
from tests.fakes.range_server import RangeServer

pytestmark = pytest.mark.timeout(120)

ATTENTION = ReferenceBackend(torch.device("cpu")).attention([], torch.float32, 16)  # nobody attends here


@pytest.fixture
def store(checkpoints: Callable[[str], Path]) -> Iterator[RangeServer]:
    with RangeServer(checkpoints("llama")).running() as server:
        yield server


@pytest.fixture
def model(store: RangeServer, tmp_path: Path) -> Callable[[str], ModelConfig]:
    """What a node's config says, with a cache of its own."""
    return lambda node: ModelConfig(source=store.url, cache_folder=str(tmp_path / node))


def plan_of(model: ModelConfig, tp: int, pp: int) -> Plan:
    parallel = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    config = Config.model_validate({"model": model.model_dump(), "parallel": parallel})
    return make_plan(config, read_spec(resolve_source(model), model.dtype))


def load(plan: Plan, folder: Path, rank: int) -> tuple[dict[str, torch.Tensor], int]:
    stage = build(plan, rank, folder, LoneShard(), torch.device("cpu"), ATTENTION)
    tensors = stage.tensors()
    return tensors, load_weights(stage.sources, tensors).fetched_bytes


def test_a_node_fetches_the_bytes_of_its_stage_once(
    store: RangeServer, model: Callable[[str], ModelConfig], checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of(model("engine"), 2, 2)
    assert store.weights() == []
    sizes = {one.key: one.range[1] - one.range[0] for one in stored_tensors(checkpoints("llama")).tensors}
    small = sum(len(data) for name, data in store.files.items() if not name.endswith(".safetensors"))
    headers = sum(store.header_end(name) for name in store.files if name.endswith(".safetensors"))
    for node, ranks in (("first", (0, 1)), ("second", (2, 3))):
        before = store.sent_bytes()
        folder = resolve_source(model(node), plan.spec.revision)
        assert store.sent_bytes() - before == small + headers + 1  # whether the store sends ranges
        fetched = 0
        for rank in ranks:
            tensors, num_bytes = load(plan, folder, rank)
            fetched += num_bytes
            expected, none = load(plan, checkpoints("llama"), rank)
            assert none == 0 and tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        of_stage = {tensor.key for rank in ranks for tensor in plan.shards[rank].tensors}
        assert fetched == store.sent_bytes() - before - small - headers - 1 == sum(map(sizes.__getitem__, of_stage))
        store.is_away = True  # a rank that starts anew needs no store
        assert load(plan, resolve_source(model(node), plan.spec.revision), ranks[0])[1] == 0
        store.is_away = False


def test_ranks_of_one_node_fetch_once_and_answer_as_from_the_folder(
    store: RangeServer,
    model: Callable[[str], ModelConfig],
    gang_on: Callable[..., Any],
    checkpoints: Callable[[str], Path],
) -> None:
    plan = plan_of(model("node"), 2, 2)
    folder = resolve_source(model("node"))
    entry = Entry(0, 0, list(range(2, 9)), [0], sample=True)
    step = StepBatch(0, 0, 0, [NewSequence(0, SamplingParams(temperature=0), [])], [], [entry])
    answers = [gang_on(plan, source, "cpu").execute(step) for source in (folder, checkpoints("llama"))]
    assert answers[0][0] == answers[1][0] and torch.equal(answers[0][1], answers[1][1])
    assert store.sent_bytes() <= sum(map(len, store.files.values())) + 1


def test_whoever_reads_a_checkpoint_by_other_means_has_it_whole(
    store: RangeServer, model: Callable[[str], ModelConfig], checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of(model("node"), 1, 1)
    ours = Reference(resolve_source(model("node")), plan, torch.device("cpu")).model.state_dict()
    theirs = Reference(checkpoints("llama"), plan, torch.device("cpu")).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_head_that_is_stored_beside_a_tied_embedding_is_compared(tmp_path: Path, checkpoints: Any) -> None:
    """The spec reads some rows of both: of the copy these are fetched then."""
    with RangeServer(checkpoints("llama")).running() as store:
        config = {**json.loads(store.files["config.json"]), "tie_word_embeddings": True}
        store.files["config.json"] = json.dumps(config).encode()
        model = ModelConfig(source=store.url, cache_folder=str(tmp_path))
        assert not read_spec(resolve_source(model)).tied_head
        assert 0 < sum(one.end - one.first for one in store.weights()) <= 2 * 16 * config["hidden_size"] * 4


def test_a_copy_is_no_folder_to_serve(model: Callable[[str], ModelConfig], tmp_path: Path) -> None:
    folder = resolve_source(model("node"))
    with pytest.raises(ValueError, match=r"is a copy of which parts may be missing; name its URL, http://127"):
        resolve_source(ModelConfig(source=str(folder)))
    moved = folder.rename(tmp_path / "moved")  # with a manifest that says it is one, and whole
    assert resolve_source(ModelConfig(source=str(moved))) == moved and source_module.revision_of(moved) is None


def test_a_plan_reads_no_weights(
    store: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "HF_HOME", str(tmp_path))
    assert main(["plan", store.url, "--tp", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensor_parallel_size"] == 2
    assert store.weights() == [] and (tmp_path / "stagemesh").is_dir()
