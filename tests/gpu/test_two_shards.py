"""Two shards on one GPU: sums over symmetric memory, also inside graphs, and a tiny model in two shards.

pytest -m gpu -k two_shards

torch lets ranks share a device for tests of symmetric memory, and NCCL does not: what is not summed there goes through
gloo over the host. The two processes take turns on the GPU, so that times mean nothing. On a CPU the same runs without
symmetric memory and without graphs.
"""

import functools
import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.decisions.model.plan import make_plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives import symmetric_memory
from cluster.collectives.interface import LoneShard
from cluster.collectives.methods import BUFFER_BYTES
from cluster.collectives.process_group import GlooGroup, TorchStage
from cluster.collectives.rendezvous import host_store, join_store
from cluster.collectives.symmetric_memory import SymmetricStage, with_symmetric_memory
from configs.config import Config

ADDRESS = "127.0.0.1"
NUM_REPLAYS = 100
NEEDS_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = [pytest.param("cpu", marks=pytest.mark.soak), pytest.param("cuda", marks=NEEDS_A_GPU)]

pytestmark = pytest.mark.timeout(300)


class HostStage(TorchStage):
    """Sums over the host, whatever the device."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(super().all_reduce(tensor.cpu()))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_gather(tensor.cpu()).to(tensor.device)


@pytest.fixture
def run():
    """run(scenario, num_ranks, **arguments) → what came of each rank."""
    helper = Path(__file__).parent.parent / "cpu" / "group_process.py"
    store, port = host_store(ADDRESS)
    run_ranks = runpy.run_path(str(helper))["run_ranks"]
    run_ranks.__globals__["ANSWER_S"] = 240.0  # two processes take turns, and compile kernels
    yield functools.partial(run_ranks, __file__, num_ranks=2, port=port)
    del store


def join(rank: int, port: int, device: torch.device) -> Any:
    """The stage group; its name in the store is the epoch's."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # read once, when memory is allocated
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = join_store(ADDRESS, port, 1, 60.0)
    fallback = HostStage(GlooGroup("stage0", store, [0, 1], rank, ADDRESS, 60.0))
    stage = with_symmetric_memory(fallback, store, 0, device)
    assert isinstance(stage, SymmetricStage) is (device.type == "cuda"), "see the log for the reason"
    assert stage.can_abort is (device.type != "cuda")
    return stage


def sum_each_way(rank: int, port: int, device: str) -> list[str]:
    """Every method, dtype and size, several messages behind each other → the methods that were tried."""
    stage = join(rank, port, torch.device(device))
    methods = ["nccl"]
    if isinstance(stage, SymmetricStage):
        methods += ["one_shot", "two_shot"] + (["multimem"] if stage._links.has_multicast else [])
    for method in methods:
        with mock.patch.object(symmetric_memory, "method_for", lambda *_, method=method: method):
            for dtype in (torch.bfloat16, torch.float32):
                for count in (8, 4096, 8, BUFFER_BYTES // dtype.itemsize, 24, 100_000):
                    message_N = torch.arange(count, device=device) % 8
                    total_N = stage.all_reduce((message_N + rank).to(dtype))
                    assert torch.equal(total_N.long(), 2 * message_N + 1), (method, dtype, count)
    gathered = stage.all_gather(torch.full((3,), rank, device=device))
    assert gathered.tolist() == [[0] * 3, [1] * 3]
    stage.close()
    return methods


def sum_in_graphs(rank: int, port: int, device: str) -> list[str]:
    """For each method that a graph can hold here, sums of sums that are replayed → the methods that were tried."""
    stage = join(rank, port, torch.device(device))
    methods = ["one_shot", "two_shot"] if device == "cuda" else ["nccl"]
    for method in methods:
        with mock.patch.object(symmetric_memory, "method_for", lambda *_, method=method: method):
            replay_sums(stage, rank, device)
    stage.close()
    return methods


def replay_sums(stage: Any, rank: int, device: str) -> None:
    """Sums of sums in one graph, of several sizes; before each replay one shard is late."""
    counts = (64, 4096, 64, 200_000, 8)
    inputs = [torch.zeros(count, device=device) for count in counts]

    def chain() -> list[torch.Tensor]:
        """Each sum is of the message and of the first number of the sum before it."""
        outputs: list[torch.Tensor] = []
        for message_N in inputs:
            last = outputs[-1][:1] if outputs else 0.0
            outputs.append(stage.all_reduce(message_N + last))
        return outputs

    replay, outputs = chain, chain()
    if device == "cuda":
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            chain()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = chain()
        replay = graph.replay  # type: ignore[assignment]
    for number in range(NUM_REPLAYS):
        for index, message_N in enumerate(inputs):
            message_N.fill_(number + index + rank)
        if device == "cuda" and number % 2 == rank:
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        outputs = replay() or outputs
        expected = 0.0
        for index, total_N in enumerate(outputs):
            expected = 2 * (number + index + expected) + 1
            assert torch.equal(total_N.cpu(), torch.full((counts[index],), expected)), (number, index)


def make_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=201,
        initializer_range=0.1,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def ids_of(runner: Runner, folder: Path) -> list[list[list[int]]]:
    """Three prompts, then 30 steps of decode, fed with fixed ids → what is sampled in each step."""
    runner.load(folder)
    runner.allocate_cache(60)
    runner.warm_up()
    for shape in reversed(runner.shapes):
        assert runner.capture(shape) is None
    sampling = [SamplingParams(temperature=0), SamplingParams(0.8, seed=3), SamplingParams(0.9, seed=4, top_k=9)]
    opened = [NewSequence(seq, params, []) for seq, params in enumerate(sampling)]
    prompts = [list(range(5)), list(range(7, 48)), list(range(60, 63))]
    steps = [[Entry(seq, 0, ids, list(range(10 * seq, 10 * seq + 10)), True) for seq, ids in enumerate(prompts)]]
    steps += [[Entry(seq, len(ids) + i, [i + 1], [], True) for seq, ids in enumerate(prompts)] for i in range(30)]
    answers = []
    for number, entries in enumerate(steps):
        answer = runner.execute(StepBatch(0, number, 0, [] if number else opened, [], entries))
        assert answer is not None
        answers.append(answer.token_ids)
    return answers


def serve(rank: int, port: int, device: str, folder: Path) -> list[list[list[int]]]:
    stage = join(rank, port, torch.device(device))
    backend = CUDABackend(torch.device(device))
    backend.set_up()
    neighbors: Any = SimpleNamespace(stage=stage, previous=None, next=None, feedback=None)
    ids = ids_of(Runner(plan_of(folder, 2), rank, neighbors, backend), folder)
    stage.close()
    return ids


def plan_of(folder: Path, num_shards: int) -> Any:
    config = Config(
        model={"source": str(folder), "dtype": "float32"}, parallel={"tensor_parallel_size": num_shards}
    )  # fmt: skip
    return make_plan(config, read_spec(folder, "float32"))


@pytest.mark.parametrize("device", DEVICES)
def test_two_shards_sum_by_every_method_in_reach(run, device):
    methods = ["nccl"] if device == "cpu" else ["nccl", "one_shot", "two_shot"]
    for answer in run("sum_each_way", device=device):
        assert answer[0] == "ok", answer
        assert answer[1][: len(methods)] == methods


@pytest.mark.parametrize("device", DEVICES)
def test_two_shards_sum_in_a_graph_that_is_replayed(run, device):
    for answer in run("sum_in_graphs", device=device):
        assert answer == ("ok", ["nccl"] if device == "cpu" else ["one_shot", "two_shot"])


@pytest.mark.all_cores
@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
def test_two_shards_of_a_model_bring_the_ids_of_the_cpu(run, device, tmp_path):
    folder = make_folder(tmp_path)
    alone: Any = SimpleNamespace(stage=LoneShard(), previous=None, next=None, feedback=None)
    expected = ids_of(Runner(plan_of(folder, 1), 0, alone, CPUBackend(torch.device("cpu"))), folder)
    assert len({token_id for step in expected for (token_id,) in step}) > 20
    assert run("serve", device=device, folder=folder) == [("ok", expected)] * 2
