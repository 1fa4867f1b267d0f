"""A rank of a model with random weights that are made on the device, with or without the shards beside it."""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig

from actors.decisions.model.plan import Plan, make_plan
from actors.tensors import runner as runner_module
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.model import stage_model
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Entry, SamplingParams
from cluster.collectives.interface import LoneShard
from configs.config import Config

GREEDY = SamplingParams(temperature=0)
LLAMA3 = {"num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, int | float]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
             "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 2048},
    "llama8b": LLAMA3 | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                         "intermediate_size": 14336},
    "llama70b": LLAMA3 | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                          "intermediate_size": 28672},
}  # fmt: skip


class OneOfMany:
    """A shard whose neighbors are not there: what it exchanges comes back as it was."""

    def __init__(self, shard: int, size: int) -> None:
        self.shard, self.size = shard, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(self.size) if tensor.numel() == 1 else tensor  # a vote: the others think alike

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor] * self.size)

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Alone:
    """The neighbors of a rank that runs by itself."""

    previous = next = feedback = None

    def __init__(self, shard: int, size: int) -> None:
        self.stage = LoneShard() if size == 1 else OneOfMany(shard, size)


def config_of(shape: str, dtype: str) -> LlamaConfig:
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.dtype = getattr(torch, dtype)
    config.architectures = ["LlamaForCausalLM"]
    return config


def plan_of(shape: str, dtype: str, num_shards: int = 1, **settings: Any) -> Plan:
    """`settings`: max_model_len, and those of the scheduler."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(shape, dtype).save_pretrained(folder)
        config = Config(
            model={"source": folder, "dtype": dtype, "max_model_len": settings.pop("max_model_len")},
            parallel={"tensor_parallel_size": num_shards},
            cache={"block_size": CUDABackend.default_block_size},
            scheduler=settings,
        )
        return make_plan(config, read_spec(Path(folder), dtype))


def random_runner(plan: Plan, device: torch.device, num_blocks: int, shape: str, shard: int = 0) -> Runner:
    """A rank of a plan on a device, warm: as `load` makes it, but with random numbers instead of a checkpoint's."""
    backend = CUDABackend(device)
    backend.set_up()
    runner = Runner(plan, shard, Alone(shard, plan.topology.tensor_parallel_size), backend)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(stage_model, "find_sources", lambda *_: None),
        mock.patch.object(runner_module, "load_weights", _fill),
    ):
        config_of(shape, plan.spec.dtype).save_pretrained(folder)
        runner.load(Path(folder))
    runner.allocate_cache(num_blocks)
    runner.warm_up()
    return runner


def capture(runner: Runner, *steps: list[Entry]) -> None:
    """Capture the shapes of some steps in graphs, the largest first, where the device has graphs."""
    assert runner.graphs is not None
    shapes = {runner.graphs.buckets.of_step(entries) for entries in steps}
    for shape in sorted(shapes & set(runner.shapes), reverse=True):
        runner.capture(shape)


def _fill(sources: object, tensors: dict[str, torch.Tensor], progress: object) -> None:
    for name, tensor in tensors.items():
        with torch.no_grad():
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02)


def weight_bytes_read(plan: Plan, shard: int) -> int:
    """Of weights, in a decode step: the embedding is only looked up in."""
    found = plan.shards[shard]
    embedding = f"{plan.spec.embedding_name}.weight"
    return sum(
        torch.Size(tensor.shape).numel() * getattr(torch, tensor.dtype).itemsize
        for tensor in found.tensors
        if tensor.name != embedding or found.shares_tied_weight
    )
