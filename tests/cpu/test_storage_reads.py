"""What loading takes from storage, counted by the kernel: a node reads its own bytes, and reads them once."""

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Phi3Config

from actors.decisions.model.plan import Plan, make_plan
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.model.stage_model import build
from actors.tensors.weights.checkpoint import load_weights
from cluster.collectives.interface import LoneShard
from configs.config import Config

ATTENTION = ReferenceBackend(torch.device("cpu")).attention([], torch.float32, 16)  # nobody attends here

pytestmark = pytest.mark.timeout(120)

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "architectures": ["?"],
    "dtype": "float32",
}
KINDS = {
    "dense": lambda: LlamaConfig(**COMMON, intermediate_size=1536),
    "fused": lambda: Phi3Config(**COMMON, intermediate_size=1536),
    "experts": lambda: MixtralConfig(**COMMON, intermediate_size=384, num_local_experts=4),
}
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some tens of MB in several files."""
    path = tmp_path_factory.mktemp(request.param)
    model: Any = AutoModelForCausalLM.from_config(KINDS[request.param](), dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path, max_shard_size="8MB")
    return path


def plan_of(folder: Path, tp: int, pp: int) -> Plan:
    parallel = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    return make_plan(Config.model_validate({"model": {"source": str(folder)}, "parallel": parallel}), read_spec(folder))


def evict(folder: Path) -> None:
    """Out of the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_storage() -> int:
    """Bytes that this process has caused to be fetched from storage so far: proc_pid_io(5)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


@pytest.fixture
def cold(folder: Path) -> Iterator[int]:
    """The counter, once the files are out of memory and it is known to count."""
    evict(folder)
    before = read_from_storage()
    probe = next(folder.glob("*.safetensors"))
    probe.read_bytes()
    if read_from_storage() - before < 0.9 * probe.stat().st_size:
        pytest.skip("the kernel does not count what this file system reads from storage")
    evict(folder)
    return read_from_storage()


def load(plan: Plan, folder: Path, rank: int) -> int:
    stage = build(plan, rank, folder, LoneShard(), torch.device("cpu"), ATTENTION)
    return load_weights(stage.sources, stage.tensors()).bytes_copied


@pytest.mark.parametrize(("tp", "stage"), [(4, None), (2, 0), (2, 1)])
def test_a_node_reads_its_bytes_once(folder: Path, cold: int, tp: int, stage: int | None) -> None:
    plan = plan_of(folder, tp, 1 if stage is None else 2)
    ranks = plan.topology.stage_ranks(stage or 0)
    copied = [load(plan, folder, rank) for rank in ranks]
    fetched = read_from_storage() - cold
    own = plan_of(folder, 1, plan.topology.pipeline_parallel_size).shards[stage or 0].weight_bytes
    # Headers, and the rest of a page at the ends of what is read
    slack = sum(1 for _ in folder.glob("*.safetensors")) * 64 * PAGE
    assert own * 0.9 < fetched + slack
    assert fetched <= 1.05 * own + slack, f"{fetched / own:.3f} times its bytes"
    for rank, num_bytes in zip(ranks, copied, strict=True):
        assert num_bytes == plan.shards[rank].weight_bytes


def test_shards_that_load_at_once_share_what_is_read(folder: Path, cold: int) -> None:
    plan = plan_of(folder, 4, 1)
    stages = [build(plan, rank, folder, LoneShard(), torch.device("cpu"), ATTENTION) for rank in range(4)]
    order = random.Random(0).sample(range(4), 4)
    threads = [
        threading.Thread(target=load_weights, args=(stages[rank].sources, stages[rank].tensors())) for rank in order
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = plan_of(folder, 1, 1).shards[0].weight_bytes
    slack = sum(1 for _ in folder.glob("*.safetensors")) * 64 * PAGE
    assert read_from_storage() - cold <= 1.05 * own + slack


@pytest.mark.soak
def test_loading_is_nearly_as_fast_as_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cold both times, in turn: a rank that holds everything against a plain sequential read of the same files."""
    model: Any = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**COMMON, "hidden_size": 2048}, intermediate_size=5632), dtype=torch.bfloat16
    )
    model.config.architectures, model.config.dtype = [type(model).__name__], "bfloat16"
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    stage = build(plan_of(tmp_path, 1, 1), 0, tmp_path, LoneShard(), torch.device("cpu"), ATTENTION)
    tensors = stage.tensors()
    for tensor in tensors.values():
        tensor.zero_()  # its memory is there
    ratios = []
    for _ in range(5):
        evict(tmp_path)
        began = time.monotonic()
        for file in sorted(tmp_path.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 20):
                    pass
        plain_s = time.monotonic() - began
        evict(tmp_path)
        began = time.monotonic()
        load_weights(stage.sources, tensors)
        ratios.append(plain_s / (time.monotonic() - began))
    with capsys.disabled():
        print(f"\nload rate / sequential read rate, {stage.shard.weight_bytes / 1e6:.0f} MB: {sorted(ratios)[2]:.2f}")
    assert sorted(ratios)[2] > 0.4
