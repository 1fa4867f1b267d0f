"""The KV cache is sized by the largest step, which is run; and a plan counts what that step takes."""

import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, PreTrainedConfig

from actors.decisions.model.memory import activation_bytes
from actors.decisions.model.plan import Plan, make_plan
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.measure import num_blocks_that_fit
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from cluster.collectives.interface import LoneShard
from configs.config import Config
from tests.fakes.held_bytes import HeldBytes

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

    def __init__(self, inner: Any) -> None:
        self.substitutions: list[Any] = []
        self.choose_kernels, self.plan, self.write = inner.choose_kernels, inner.plan, inner.write

    def attend(self, cache: Any, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return query.new_zeros(query.shape[1], query.shape[0], cache.values_NbHD.shape[3])


class CountingBackend(ReferenceBackend):
    """Reports its allocations."""

    peak = 0

    def attention(self, specs: Any, dtype: torch.dtype, block_size: int) -> Any:
        return KernelAttention(super().attention([], dtype, block_size))

    def peak_bytes(self, run: Callable[[int], None], num_tokens: int) -> int:
        with HeldBytes() as held:
            run(num_tokens)
        self.peak = held.peak
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


# (sequences, tokens of a step, vocabulary): of many tokens the layers take the most, of many sequences the sampling
STEPS = {"layers": (8, 128, 64), "sampling": (128, 160, 2000), "log-probabilities": (4, 300, 4000)}


@pytest.mark.parametrize(
    ("family", "step"), [*product(FAMILIES, ["layers"]), ("llama", "sampling"), ("llama", "log-probabilities")]
)
def test_planned_activations_are_near_those_that_are_counted(family: str, step: str, tmp_path: Path) -> None:
    max_num_seqs, num_tokens, vocab_size = STEPS[step]
    folder = folder_of(family, tmp_path, vocab_size)
    plan = planned(folder, max_num_seqs, num_tokens)
    backend = CountingBackend(CPU)
    runner = Runner(plan, 0, ALONE, backend)
    runner.load(folder)
    with torch.inference_mode():
        num_blocks_that_fit(runner, 0.95, 1)
    whole_bytes = plan.shards[0].weight_bytes + backend.peak
    difference = activation_bytes(plan, 0, num_tokens) - backend.peak
    print(family, step, difference, backend.peak, whole_bytes, difference / whole_bytes)
    assert -0.01 * whole_bytes < difference < 0.05 * whole_bytes
