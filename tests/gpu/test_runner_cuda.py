"""The reference backend on a GPU: the same tokens and nearly the same logits as the CPU backend's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from actors.decisions.model.plan import make_plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.tensors.sequence_table import StepTensors
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives.interface import LoneShard
from configs.config import Config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Alone:
    stage = LoneShard()
    previous = None
    next = None
    feedback = None


class RecordingRunner(Runner):
    output: torch.Tensor

    def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
        self.output = super().forward(tensors, state)
        return self.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=192,
        vocab_size=201,
        sliding_window=20,
        initializer_range=0.1,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def run(folder: Path, device: str, dtype: str) -> tuple[list[list[int]], torch.Tensor]:
    """Three prompts, one in two chunks, then ten steps of decode, fed with fixed ids → what is sampled, and logits."""
    config = Config(model={"source": str(folder), "dtype": dtype, "max_model_len": 320})
    backend = (ReferenceBackend if device == "cuda" else CPUBackend)(torch.device(device))
    runner = RecordingRunner(make_plan(config, read_spec(folder, dtype)), 0, Alone(), backend)
    runner.load(folder)
    runner.allocate_cache(100)
    runner.warm_up()
    sampling = [SamplingParams(temperature=0), SamplingParams(0.8, seed=3), SamplingParams(temperature=0)]
    opened = [NewSequence(seq, params, []) for seq, params in enumerate(sampling)]
    prompts = [list(range(5)), list(range(7, 48)), list(range(200)) + list(range(90))]
    entries = [Entry(seq, 0, ids, list(range(20 * seq, 20 * seq + 20)), True) for seq, ids in enumerate(prompts)]
    entries[2] = Entry(2, 0, prompts[2][:150], entries[2].new_blocks, False)
    steps = [entries, [Entry(2, 150, prompts[2][150:], [], True)]]
    steps += [[Entry(seq, len(ids) + i, [i], [], True) for seq, ids in enumerate(prompts)] for i in range(10)]
    sampled, logits = [], []
    for number, entries in enumerate(steps):
        answer = runner.execute(StepBatch(0, number, 0, opened if number == 0 else [], [], entries))
        assert answer is not None
        sampled += answer.token_ids
        logits.append(runner.output.float().cpu())
    return sampled, torch.cat(logits)


@pytest.mark.timeout(300)
def test_float32_agrees_with_the_cpu(folder: Path) -> None:
    on_cpu, expected = run(folder, "cpu", "float32")
    on_gpu, logits = run(folder, "cuda", "float32")
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert on_gpu == on_cpu


@pytest.mark.timeout(300)
def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    _, expected = run(folder, "cpu", "float32")
    _, logits = run(folder, "cuda", "bfloat16")
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 1e-2
