"""The KV cache is sized by the largest step, which is run; and a plan counts what that step takes."""

import functools
from collections.abc import Callable
from itertools import accumulate, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch.autograd import profiler
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, PreTrainedConfig

from actors.decisions.model.memory import activation_bytes
from actors.decisions.model.plan import Plan, make_plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.host_memory import available_bytes
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.measure import num_blocks_that_fit
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives.interface import LoneShard
from configs.config import Config

CPU = torch.device("cpu")
ALONE: Any = SimpleNamespace(stage=LoneShard(), previous=None, next=None, feedback=None)
FREE_BYTES = 50_000_000
COMMON = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,  # so that weights are most of the memory, as they are
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": functools.partial(LlamaConfig, num_key_value_heads=2, intermediate_size=896),
    "gemma2": functools.partial(Gemma2Config, num_key_value_heads=4, head_dim=32, intermediate_size=1024),
    "mixtral": functools.partial(
        MixtralConfig, num_key_value_heads=2, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2
    ),
}


class KernelAttention:
    """Takes the memory of a kernel: its result, and nothing in between."""

    reads_unwritten = False

    def __init__(self, inner: Any) -> None:
        self.substitutions: list[Any] = []
        self.choose_kernels, self.plan, self.write = inner.choose_kernels, inner.plan, inner.write

    def attend(self, cache: Any, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return query.new_zeros(query.shape[1], query.shape[0], cache.values_NbHD.shape[3])


class CountingBackend(ReferenceBackend):
    """Reports its allocations."""

    runs_ahead: ClassVar[bool] = True  # as a GPU
    peak = 0

    def attention(self, specs: Any, dtype: torch.dtype, block_size: int) -> Any:
        return KernelAttention(super().attention([], dtype, block_size))

    def peak_bytes(self, run: Callable[[int], None], num_tokens: int, num_captured: int) -> int:
        run(16)
        self.peak = peak_of(lambda: run(num_tokens))
        return self.peak

    def free_bytes(self, ranks_on_node: int) -> int:
        return FREE_BYTES


def folder_of(family: str, parent: Path, vocab_size: int) -> Path:
    config = FAMILIES[family](**COMMON, vocab_size=vocab_size)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(parent)
    return parent


def planned(folder: Path, max_num_seqs: int, max_num_batched_tokens: int) -> Plan:
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    return make_plan(Config(model={"source": str(folder)}, scheduler=limits), read_spec(folder, "bfloat16"))


def peak_of(work: Callable[[], None]) -> int:
    """The most bytes that tensors take at a time, beyond those before, as torch's allocator reports them."""
    with profiler.profile(use_cpu=True, profile_memory=True) as profile:
        work()
    events: Any = profile.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(num_bytes for _, num_bytes in changes))


# (sequences, tokens of a step, vocabulary): of many tokens the layers take the most, of many sequences the sampling
STEPS = {"layers": (8, 96, 64), "sampling": (128, 160, 2000), "log-probabilities": (4, 300, 4000)}


@pytest.mark.parametrize(
    ("family", "step"), [*product(FAMILIES, ["layers"]), ("llama", "sampling"), ("llama", "log-probabilities")]
)
def test_planned_activations_are_near_those_that_are_counted(family: str, step: str, tmp_path: Path) -> None:
    """Within 5 % of the whole rank's memory. Layers without substitutes take somewhat less than planned."""
    max_num_seqs, num_tokens, vocab_size = STEPS[step]
    folder = folder_of(family, tmp_path, vocab_size)
    plan = planned(folder, max_num_seqs, num_tokens)
    backend = CountingBackend(CPU)
    runner = Runner(plan, 0, ALONE, backend)
    runner.load(folder)
    num_blocks = num_blocks_that_fit(runner, 0.9, 1)
    assert num_blocks == int((FREE_BYTES - backend.peak) * 0.9) // plan.kv_bytes_per_block(0)
    whole_bytes = plan.shards[0].weight_bytes + backend.peak
    difference = activation_bytes(plan, 0, num_tokens) - backend.peak
    assert -0.01 * whole_bytes < difference < 0.05 * whole_bytes, (difference, backend.peak, whole_bytes)


def test_what_has_no_room_is_refused_by_the_key_that_mends_it(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path, 64)
    runner = Runner(planned(folder, 8, 96), 0, ALONE, CountingBackend(CPU))
    runner.load(folder)
    no_room = mock.patch.object(CountingBackend, "peak_bytes", side_effect=torch.OutOfMemoryError("1 GiB"))
    with (
        no_room,
        pytest.raises(ValueError, match=r"scheduler\.max_num_batched_tokens: a step of 96 tokens has no"),
    ):
        num_blocks_that_fit(runner, 0.9, 1)
    with mock.patch.object(CountingBackend, "free_bytes", return_value=1000):
        assert num_blocks_that_fit(runner, 0.9, 1) == 0


def test_a_rank_that_has_measured_computes_as_one_that_has_not(tmp_path: Path) -> None:
    """On the CPU backend, by how the process grows: the ranks of a node share its memory."""
    folder, ids = folder_of("llama", tmp_path, 64), []
    plan = planned(folder, 8, 96)
    for measures in (True, False):
        runner = Runner(plan, 0, ALONE, CPUBackend(CPU))
        runner.load(folder)
        if measures:
            alone, among_four = num_blocks_that_fit(runner, 0.9, 1), num_blocks_that_fit(runner, 0.9, 4)
            assert 0.5 < alone * plan.kv_bytes_per_block(0) / available_bytes() < 0.85
            assert 0.2 * alone < among_four < 0.3 * alone
        runner.allocate_cache(plan.num_blocks_for_longest)
        runner.warm_up()
        opened = [NewSequence(0, SamplingParams(0.9, seed=3), [], 5)]
        steps = [StepBatch(1, 0, 0, opened, [], [Entry(0, 0, [1, 2, 3, 4, 5], [3], True)])]
        steps += [StepBatch(1, 1 + i, 0, [], [], [Entry(0, 5 + i, [i], [], True)]) for i in range(8)]
        ids.append([sampled.token_ids for step in steps if (sampled := runner.execute(step))])
    assert ids[0] == ids[1]
    assert len({token_id for step in ids[0] for (token_id,) in step}) > 3
