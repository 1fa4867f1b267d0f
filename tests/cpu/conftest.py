"""Tiny checkpoints of every supported family, and a pool of rank processes that any layout can borrow."""

import dataclasses
import functools
import json
import multiprocessing
import os
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import ModelSpec
from actors.tensors.model import spec_reader
from actors.tensors.model.config_reader import read_config_json
from actors.tensors.model.spec_reader import read_spec, resolve_dtype
from actors.tensors.runner import Sampled
from actors.words.messages import StepBatch
from cluster.collectives.rendezvous import host_store
from configs.config import Config

os.environ["OMP_NUM_THREADS"] = "1"  # for the rank processes
torch.set_num_threads(1)

NUM_RANKS = 12
NUM_BLOCKS = 96
BLOCK_SIZE = 4
MAX_MODEL_LEN = 80
ANSWER_S = 100.0

COMMON = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 7,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Vocabularies are not divisible by 4; two families have fewer KV heads than 4 shards.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON, vocab_size=103, num_key_value_heads=4),
    "llama_tied": lambda: LlamaConfig(
        **COMMON, vocab_size=101, num_key_value_heads=8, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "mistral": lambda: MistralConfig(**COMMON, vocab_size=97, num_key_value_heads=2, head_dim=16, sliding_window=5),
    "qwen2": lambda: Qwen2Config(
        **COMMON,
        vocab_size=102,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=3,
    ),
    "qwen3": lambda: Qwen3Config(**COMMON, vocab_size=99, num_key_value_heads=2, head_dim=16),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, biases and norms too; logits peaked, so that rounding decides no arg-max."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(noise * 0.5)
            elif "norm" in name:
                parameter.copy_((1 + 0.3 * noise) * (3 if name == "model.norm.weight" else 1))
            elif "lm_head" in name or "embed_tokens" in name:
                parameter.copy_(noise * 0.1)  # small: a tied head would else repeat what was read
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint, made once."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            config = FAMILIES[family]()
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            randomise(model, seed=len(family))
            folder = tmp_path_factory.mktemp(family)
            # Several files, so that an index is read
            model.save_pretrained(folder, max_shard_size="150KB" if family != "llama_tied" else "1GB")
            made[family] = folder
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def plan_of(checkpoints: Callable[[str], Path]) -> Callable[..., Plan]:
    """The plan of a family in a layout; any config key by group, e.g. `cache={...}`."""
    specs: dict[str, Any] = {}

    def make(family: str, tensor_parallel: int = 1, pipeline_parallel: int = 1, **groups: Any) -> Plan:
        folder = checkpoints(family)
        if family not in specs:
            specs[family] = read_spec(folder)
        arguments = {
            "model": {"source": str(folder), "max_model_len": MAX_MODEL_LEN},
            "parallel": {"tensor_parallel_size": tensor_parallel, "pipeline_parallel_size": pipeline_parallel},
            "cache": {"block_size": BLOCK_SIZE},
        }
        for group, keys in groups.items():
            arguments[group] = {**arguments.get(group, {}), **keys}
        return make_plan(Config(**arguments), specs[family])

    return make


@pytest.fixture(scope="session")
def specs_read() -> Callable[..., ModelSpec]:
    """`read_spec`, once for each config.json and dtype: it probes the model, which takes seconds for a large one."""

    @functools.cache
    def read(folder: Path, config: bytes, dtype: str, only_tested: bool) -> ModelSpec:
        return read_spec(folder, dtype, only_tested)

    def remembered(folder: Path, dtype: str = "auto", only_tested: bool = True) -> ModelSpec:
        resolved, _ = resolve_dtype(read_config_json(folder), folder, dtype)
        return read(folder, (folder / "config.json").read_bytes(), resolved, only_tested)

    return remembered


@pytest.fixture
def specs_are_read_once(specs_read: Callable[..., ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is made of a spec, over and over for the same few models."""
    monkeypatch.setattr(spec_reader, "read_spec", specs_read)


class Pool:
    """Rank processes, started once and lent to one gang after the other."""

    def __init__(self, num_ranks: int, rehearsal: tuple[Plan, Path]) -> None:
        context = multiprocessing.get_context("spawn")
        self.store, self.port = host_store("127.0.0.1")
        self.epoch = 0
        pipes = [context.Pipe() for _ in range(num_ranks)]
        self.connections: list[Connection] = [ours for ours, _ in pipes]
        script = str(Path(__file__).with_name("rank_process.py"))
        given = {"connections": [theirs for _, theirs in pipes], "rehearsal": rehearsal}
        self.mother = context.Process(target=runpy.run_path, args=(script, given, "rank_process"))
        self.mother.start()
        for _, theirs in pipes:
            theirs.close()

    def ask(self, jobs: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """One job to each of the first ranks, at the same time → their answers."""
        self.tell(jobs)
        return self.hear(len(jobs))

    def tell(self, jobs: list[tuple[str, tuple[Any, ...]]]) -> None:
        """Begin one job on each of the first ranks; `hear` waits for their ends."""
        for connection, job in zip(self.connections, jobs, strict=False):
            connection.send(job)

    def hear(self, num_ranks: int) -> list[Any]:
        """The answers of the first ranks to the jobs that they were told."""
        answers = []
        for rank, connection in enumerate(self.connections[:num_ranks]):
            assert connection.poll(ANSWER_S), f"rank {rank} did not answer"
            answers.append(connection.recv())
        errors = [f"rank {rank}: {what}" for rank, (kind, what) in enumerate(answers) if kind == "error"]
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.mother.join(20)
        assert self.mother.exitcode == 0, "ranks did not leave when their connections ended"


@dataclasses.dataclass
class Gang:
    """All ranks of one layout; what a test asks for steps."""

    pool: Pool
    plan: Plan
    loaded_bytes: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def start(
        cls,
        pool: Pool,
        plan: Plan,
        folder: Path,
        num_blocks: int = NUM_BLOCKS,
        device: str = "cpu",
        shares: bool = True,
    ) -> "Gang":
        pool.epoch += 1
        given = folder, pool.port, pool.epoch, num_blocks, device, shares
        jobs = [("start", (plan, shard.rank, *given)) for shard in plan.shards]
        return cls(pool, plan, pool.ask(jobs))

    def rejoin(self) -> None:
        """Meet again at the next epoch, weights kept."""
        self.pool.epoch += 1
        self.pool.ask([("rejoin", (self.pool.port, self.pool.epoch)) for _ in self.plan.shards])

    def execute(self, step: StepBatch) -> tuple[Sampled, torch.Tensor | None]:
        """What the step brings, the same on every shard of the last stage, and its logits [rows, vocabulary]."""
        answers = self.pool.ask([("execute", (step,)) for _ in self.plan.shards])
        topology = self.plan.topology
        last = topology.stage_ranks(topology.pipeline_parallel_size - 1)
        assert all(answers[rank][0] is None for rank in range(topology.num_ranks) if rank not in last)
        sampled = answers[last[0]][0]
        assert all(answers[rank][0] == sampled for rank in last)
        logits = torch.cat([torch.from_numpy(answers[rank][1]) for rank in last], dim=1) if step.entries else None
        return sampled, logits


@pytest.fixture(scope="session")
def pool(plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]) -> Iterator[Pool]:
    ranks = Pool(NUM_RANKS, (plan_of("llama"), checkpoints("llama")))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def gang_of(pool: Pool, plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]) -> Callable[..., Gang]:
    """A gang of a family in a layout; the one before it is given up."""

    def start(family: str, tensor_parallel: int = 1, pipeline_parallel: int = 1, **groups: Any) -> Gang:
        plan = plan_of(family, tensor_parallel, pipeline_parallel, **groups)
        return Gang.start(pool, plan, checkpoints(family))

    return start


@pytest.fixture(scope="session")
def gang_on(pool: Pool, checkpoints: Callable[[str], Path]) -> Callable[..., Gang]:
    """A gang of a plan, of a family or a folder, on a backend (`device` as in a config); the one before is given up."""

    def start(plan: Plan, source: str | Path, device: str, shares: bool = True) -> Gang:
        folder = source if isinstance(source, Path) else checkpoints(source)
        return Gang.start(pool, plan, folder, device=device, shares=shares)

    return start


def rewrite_config(folder: Path, **keys: Any) -> None:
    """Change keys of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
