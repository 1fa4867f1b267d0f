"""Runs of decoder layers in one kernel call give what the layers give one by one."""

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from actors.decisions.model.plan import Plan, make_plan
from actors.tensors.backends.cpu import gemm, paged_attention_avx512
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cpu.llama import kernel, layers
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.tensors.sequence_table import StepTensors
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch, Substitution
from cluster.collectives.exchange import BUFFER_BYTES
from cluster.collectives.interface import LoneShard, NeighborLate, NeighborLost, PresentGroup
from cluster.collectives.shared_memory import SharedMemoryStage
from configs.config import Config

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        gemm.why_not(torch.empty(32, 2, dtype=torch.bfloat16)) is not None,
        reason="this CPU has no AVX-512 dot product of bfloat16, or has AMX, which is faster",
    ),
]

GREEDY = SamplingParams(temperature=0)
SIZES = {
    "hidden_size": 192, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 4, "vocab_size": 160, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=2),
}


class Neighbors:
    """A rank's groups: only its stage's."""

    previous = next = feedback = None

    def __init__(self, stage: LoneShard | SharedMemoryStage) -> None:
        self.stage = stage


class RecordingRunner(Runner):
    """Keeps the logits of each step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.outputs: list[torch.Tensor] = []

    def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
        self.outputs.append(super().forward(tensors, state))
        return self.outputs[-1]


def plan_of(folder: Path, config: PreTrainedConfig, num_shards: int) -> Plan:
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.2).to(torch.bfloat16)
    made.save_pretrained(folder)
    keys = {"source": str(folder), "dtype": "bfloat16", "max_model_len": 128}
    arguments: dict[str, Any] = {"model": keys, "parallel": {"tensor_parallel_size": num_shards}}
    return make_plan(Config(**arguments, cache={"block_size": 16}), read_spec(folder, "bfloat16"))


def groups_of(num_shards: int, timeout_s: float = 30.0) -> list[Neighbors]:
    if num_shards == 1:
        return [Neighbors(LoneShard())]
    memory = mmap.mmap(-1, 4096 + 2 * num_shards * BUFFER_BYTES)
    return [Neighbors(SharedMemoryStage(memory, num_shards, shard, timeout_s)) for shard in range(num_shards)]


def steps_of(plan: Plan) -> list[StepBatch]:
    """Prompts alone, rows alone, both together, past windows and blocks' ends; parts of prompts, prompts' logprobs."""
    ids = torch.randint(0, 160, (7, 40), generator=torch.Generator().manual_seed(1)).tolist()
    lengths, begun = [1, 20, 33, 8, 40, 40, 20], [0, 0, 0, 3, 3]
    new = [NewSequence(i, GREEDY, [], lengths[i]) for i in range(6)]
    new += [NewSequence(6, SamplingParams(temperature=0, prompt_logprobs=2), [], lengths[6])]
    prompts = [Entry(i, 0, ids[i][: lengths[i]], list(range(4 * i, 4 * i + 4)), sample=True) for i in range(7)]

    def rows(step: int, count: int) -> list[Entry]:
        return [Entry(i, lengths[i] + step - begun[i], [], [], sample=True) for i in range(count)]

    part = Entry(5, 0, ids[5][:24], prompts[5].new_blocks, sample=False)
    told = Entry(6, 0, prompts[6].ids, prompts[6].new_blocks, sample=True, prompt_logprobs=True)
    steps = [(new[:3], prompts[:3]), ([], rows(0, 3)), ([], rows(1, 3)), (new[3:5], rows(2, 3) + prompts[3:5])]
    steps += [([], rows(step, 5)) for step in range(3, 9)]
    steps += [([new[5]], [part]), ([], [*rows(9, 5), Entry(5, 24, ids[5][24:], [], sample=True)])]
    steps += [([new[6]], [*rows(10, 5), told])]
    return [StepBatch(0, number, 0, opened, [], entries) for number, (opened, entries) in enumerate(steps)]


def runners_of(plan: Plan, folder: Path, groups: list[Neighbors]) -> list[RecordingRunner]:
    runners = [RecordingRunner(plan, rank, one, CPUBackend(torch.device("cpu"))) for rank, one in enumerate(groups)]
    for runner in runners:
        runner.load(folder)
        runner.allocate_cache(32)
    return runners


def together(runners: list[RecordingRunner], steps: list[StepBatch]) -> list[list[torch.Tensor]]:
    """The logits of each step, by shard; every shard runs in a thread of its own."""
    with ThreadPoolExecutor(len(runners)) as pool:
        list(pool.map(lambda runner: [runner.execute(step) for step in steps], runners))
    return [runner.outputs for runner in runners]


@pytest.mark.parametrize(("longest", "num_calls"), [(4096, (13, 20)), (16, (8, 47))])
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_is_one_by_one(
    family: str,
    num_shards: int,
    longest: int,
    num_calls: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_attention_avx512, "LONGEST", longest)
    plan = plan_of(tmp_path, FAMILIES[family], num_shards)
    steps = steps_of(plan)
    with monkeypatch.context() as patched:
        patched.setattr(layers, "substitute", lambda model, trials, account: None)
        apart = runners_of(plan, tmp_path, groups_of(num_shards))
    expected = together(apart, steps)
    joined = runners_of(plan, tmp_path, groups_of(num_shards))
    assert all(Substitution("decoder_layer", 4) in runner.substitutions for runner in joined)
    calls: list[int] = []
    counting = SimpleNamespace(**vars(kernel))
    counting.run = lambda *arguments: (calls.append(arguments[1].what), kernel.run(*arguments))[1]
    monkeypatch.setattr(layers, "kernel", counting)
    for shard, outputs in enumerate(together(joined, steps)):
        for step, (output, one_by_one) in enumerate(zip(outputs, expected[shard], strict=True)):
            torch.testing.assert_close(output, one_by_one, rtol=0.02, atol=0.02, msg=f"shard {shard}, step {step}")
    # Some steps have rows that nobody asks for, or a prompt for torch: parts of layers run alone
    every = kernel.PROJECT | kernel.ATTEND | kernel.FINISH
    assert (calls.count(every), len(calls)) == tuple(count * num_shards for count in num_calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_depends_on_what_else_is_in_a_step(family: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, FAMILIES[family], 1)
    (runner,) = runners_of(plan, tmp_path, groups_of(1))
    runner.warm_up()
    steps = steps_of(plan)

    def logits_of(seq: int, alone: bool) -> list[torch.Tensor]:
        """Of each step that has logits of a sequence."""
        found: list[torch.Tensor] = []
        for step in steps:
            asked = [entry.seq for entry in step.entries if entry.sample]
            if alone:
                mine = [new for new in step.opened if new.seq == seq], [e for e in step.entries if e.seq == seq]
                step = StepBatch(0, step.step, 0, mine[0], [], mine[1])
            runner.execute(step)
            if seq in asked:
                found.append(runner.outputs[-1][0 if alone else asked.index(seq)])
        runner.execute(StepBatch(0, 99, 0, [], [seq] if alone else list(range(7)), []))
        return found

    for seq in range(7):
        both = zip(logits_of(seq, alone=False), logits_of(seq, alone=True), strict=True)
        assert all(torch.equal(in_company, by_itself) for in_company, by_itself in both), f"sequence {seq}"


def test_a_cache_that_is_allocated_anew_is_the_one_that_is_read(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, FAMILIES["llama"], 1)
    (runner,) = runners_of(plan, tmp_path, groups_of(1))
    steps = steps_of(plan)
    first = [runner.execute(step) for step in steps]
    runner.execute(StepBatch(0, 99, 0, [], list(range(7)), []))
    runner.allocate_cache(28)
    assert [runner.execute(step) for step in steps] == first
    assert runner.cache is not None
    assert all(part.any() for part in runner.cache.tensors)


def test_the_time_of_exchanges_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, FAMILIES["llama"], 2)
    runners, steps = runners_of(plan, tmp_path, groups_of(2)), steps_of(plan)
    together(runners, steps[:-1])
    told: list[float] = []
    monkeypatch.setattr(PresentGroup, "add_seconds", lambda group, seconds: told.append(seconds))
    together(runners, steps[-1:])
    assert [type(seconds) for seconds in told] == [float] * 2  # a heartbeat carries them
    assert min(told) > 0


def test_a_new_rank_and_one_that_stays_start_alike_in_a_new_epoch(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, FAMILIES["llama"], 2)
    survivor, _ = runners = runners_of(plan, tmp_path, groups_of(2))
    steps = steps_of(plan)
    before = together(runners, steps)[0]
    groups = groups_of(2)
    survivor.join(groups[0])
    survivor.outputs = []
    newcomer = RecordingRunner(plan, 1, groups[1], CPUBackend(torch.device("cpu")))
    newcomer.load(tmp_path)
    newcomer.allocate_cache(32)
    after = together([survivor, newcomer], steps)[0]
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))


def test_a_neighbor_that_stays_away_is_late_and_one_that_aborts_is_lost(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, FAMILIES["llama"], 2)
    steps, groups = steps_of(plan), groups_of(2, timeout_s=0.5)
    runners = runners_of(plan, tmp_path, groups)
    together(runners, steps[:2])

    def embed_only(group: SharedMemoryStage, num_tokens: int) -> None:
        """All that the other shard takes part in: what follows is the first layer's all-reduce."""
        group.all_reduce(torch.zeros(1, num_tokens, SIZES["hidden_size"], dtype=torch.bfloat16))

    with ThreadPoolExecutor(1) as pool:
        reached = groups[1].stage.num_operations
        there = pool.submit(embed_only, groups[1].stage, 3)
        with pytest.raises(NeighborLate, match=rf"operation {reached + 2} timed out.*behind: shard 1"):
            runners[0].execute(steps[2])
        there.result(20)
        groups = groups_of(2)
        for runner, one in zip(runners, groups, strict=True):
            runner.join(one)
        together(runners, steps[:2])
        waits = pool.submit(runners[0].execute, steps[2])
        embed_only(groups[1].stage, 3)
        while groups[0].stage.num_operations == groups[1].stage.num_operations:
            time.sleep(0.001)  # until the first layer waits
        groups[1].stage.abort()
        with pytest.raises(NeighborLost, match="aborted by shard 1"):
            waits.result(20)
