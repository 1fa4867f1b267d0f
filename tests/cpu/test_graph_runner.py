"""Steps over static buffers give what plain steps give: random worlds, families, shards and stages."""

import random
import runpy
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.decisions.model.plan import Plan
from actors.tensors.backend import Backend
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.cuda.graph_runner import CUDAGraphRunner
from actors.tensors.launched import Launched, Sampled
from actors.tensors.runner import Runner
from actors.words.messages import NOT_A_NUMBER, Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives.interface import LoneShard

CPU = torch.device("cpu")
NUM_BLOCKS = 60
BLOCK_SIZE = 4
threads = runpy.run_path(str(Path(__file__).parent.parent / "families" / "threads.py"))


class Alone:
    stage = LoneShard()
    previous = None
    next = None
    feedback = None


class World:
    """Sequences that come, are prefilled in chunks, decode and go; the steps of one lane, as an engine makes them."""

    def __init__(self, seed: int, vocab_size: int, depth: int) -> None:
        self.random = random.Random(seed)
        self.vocab_size, self.depth = vocab_size, depth
        self.free = list(range(NUM_BLOCKS))
        self.open: dict[int, dict[str, Any]] = {}
        self.num_begun = self.num_steps = 0
        self.closing: list[int] = []

    def step(self, known: Callable[[int, int], int | None]) -> StepBatch:
        """`known(seq, position)`: the id there, None while the engine has not seen it."""
        opened = []
        while len(self.open) < 5 and self.random.random() < 0.5:
            opened.append(self._begin())
        entries = []
        for seq, it in self.open.items():
            if self.random.random() < 0.85:
                entries.append(self._entry(seq, it, known))
        closed, self.closing = self.closing, []
        for seq in [seq for seq, it in self.open.items() if it["done"] > 45 or self.random.random() < 0.03]:
            self.closing.append(seq)
            self.free += self.open.pop(seq)["blocks"]
        self.num_steps += 1
        return StepBatch(0, self.num_steps, 0, opened, closed, entries)

    def _begin(self) -> NewSequence:
        self.num_begun += 1
        prompt = [self.random.randrange(self.vocab_size) for _ in range(self.random.randint(1, 12))]
        self.open[self.num_begun] = {"prompt": prompt, "done": 0, "blocks": []}
        greedy = SamplingParams(temperature=0)
        choices = [greedy, SamplingParams(0.9, seed=self.num_begun), SamplingParams(0.7, seed=3, top_k=5)]
        choices += [SamplingParams(0.8, seed=4, top_p=0.9), SamplingParams(temperature=0, repetition_penalty=1.4)]
        choices += [SamplingParams(temperature=0, logprobs=2)]
        return NewSequence(self.num_begun, self.random.choice(choices), [], len(prompt))

    def _entry(self, seq: int, it: dict[str, Any], known: Callable[[int, int], int | None]) -> Entry:
        start, prompt = it["done"], it["prompt"]
        if start < len(prompt):
            ids = prompt[start : start + self.random.randint(1, 6)]
        else:
            last = known(seq, start)
            ids = [] if last is None else [last]
        end = start + max(1, len(ids))
        grown = [self.free.pop() for _ in range(-(-end // BLOCK_SIZE) - len(it["blocks"]))]
        it["blocks"] += grown
        it["done"] = end
        return Entry(seq, start, ids, grown, end >= len(prompt))


def run(world: World, launch: Callable[[StepBatch], Launched], num_steps: int) -> list[Sampled]:
    """Launch steps, up to `depth` of them before the first is taken; → what each brought."""
    ids: dict[tuple[int, int], int] = {}
    waiting: list[tuple[StepBatch, Launched]] = []
    results: list[Sampled] = []

    def take() -> None:
        step, launched = waiting.pop(0)
        sampled = launched.take()
        assert sampled is not None
        results.append(sampled)
        sampling = [entry for entry in step.entries if entry.sample]
        for entry, (token_id,) in zip(sampling, sampled.token_ids, strict=True):
            ids[entry.seq, entry.start + max(1, len(entry.ids))] = token_id

    for _ in range(num_steps):
        if len(waiting) == world.depth:
            take()
        step = world.step(lambda seq, position: ids.get((seq, position)))
        waiting.append((step, launch(step)))
    while waiting:
        take()
    return results


def make(backend: Backend, plan: Plan, folder: Path) -> Runner:
    runner = Runner(plan, 0, Alone(), backend)
    runner.load(folder)
    runner.allocate_cache(NUM_BLOCKS)
    runner.warm_up()
    return runner


# Outside a soak one family at both depths, the others at one: how late ids come is the table's affair, not the model's
DEPTHS = {"llama": (1, 2), "llama_tied": (2,), "mistral": (1,), "qwen2": (2,), "qwen3": (1,)}


@pytest.mark.parametrize(
    ("family", "depth"),
    [
        pytest.param(family, depth, marks=[] if depth in usual else [pytest.mark.soak])
        for family, usual in DEPTHS.items()
        for depth in (1, 2)
    ],
)
def test_random_worlds_bring_the_same_ids(
    family: str, depth: int, plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of(family, scheduler={"max_num_seqs": 5, "depth": depth})
    vocab_size = plan.spec.vocab_size
    expected_from = make(CPUBackend(CPU), plan, checkpoints(family))
    runner = make(CUDABackend(CPU), plan, checkpoints(family))
    assert isinstance(runner.graphs, CUDAGraphRunner)
    for seed in range(3):
        expected = run(World(seed, vocab_size, depth), expected_from.launch, 40)
        found = run(World(seed, vocab_size, depth), runner.launch, 40)
        assert [step.token_ids for step in found] == [step.token_ids for step in expected]
        # Weights and cache are as they were; rows of the last world are not
        expected_from.join(Alone())
        runner.join(Alone())
        clean(expected_from)
        clean(runner)


def clean(runner: Runner) -> None:
    assert runner.cache is not None
    runner.cache.clear(torch.arange(runner.cache.num_blocks))


class LateDownload:
    """Ids that take their time to the host, as those of a GPU do."""

    def __init__(self, ids_R: torch.Tensor, delays: random.Random) -> None:
        self.ids_R, self.delays, self.is_here = ids_R, delays, False

    def is_ready(self) -> bool:
        self.is_here = self.is_here or self.delays.random() < 0.2
        return self.is_here

    def take(self) -> torch.Tensor:
        self.is_here = True
        return self.ids_R


class LateBackend(CUDABackend):
    def __init__(self) -> None:
        super().__init__(CPU)
        self.delays = random.Random(0)

    def download(self, tensor: torch.Tensor) -> LateDownload:
        return LateDownload(tensor, self.delays)


@pytest.mark.parametrize("depth", [2, 4])
def test_ids_that_come_late_are_waited_for_where_they_are_read(
    depth: int, plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    """A row holds UNKNOWN_ID while an id is on its way: prompts, penalties and mixed steps must not take it for one."""
    plan = plan_of("llama", scheduler={"max_num_seqs": 5, "depth": 2})
    expected_from, runner = (make(backend, plan, checkpoints("llama")) for backend in (CPUBackend(CPU), LateBackend()))
    for seed in range(3, 6):
        expected = run(World(seed, plan.spec.vocab_size, 1), expected_from.launch, 40)
        found = run(World(seed, plan.spec.vocab_size, depth), runner.launch, 40)
        assert [step.token_ids for step in found] == [step.token_ids for step in expected]
        expected_from.join(Alone())
        runner.join(Alone())
        clean(expected_from)
        clean(runner)


def test_a_cache_of_another_size_has_its_own_padding_block(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of("llama", scheduler={"max_num_seqs": 5})
    expected = run(World(7, plan.spec.vocab_size, 1), make(CPUBackend(CPU), plan, checkpoints("llama")).launch, 20)
    runner = make(CUDABackend(CPU), plan, checkpoints("llama"))
    runner.allocate_cache(NUM_BLOCKS + 10)
    assert runner.num_blocks == NUM_BLOCKS + 10
    assert {len(tensor) for tensor in runner.cache.tensors} == {NUM_BLOCKS + 10 + CUDABackend.num_padding_blocks}
    found = run(World(7, plan.spec.vocab_size, 1), runner.launch, 20)
    assert [step.token_ids for step in found] == [step.token_ids for step in expected]
    used = {tuple(tensor.flatten(1).any(1).nonzero()[:, 0].tolist()) for tensor in runner.cache.tensors}
    assert all(max(blocks) >= NUM_BLOCKS + 10 and NUM_BLOCKS not in blocks for blocks in used)


def test_small_steps_run_over_static_buffers(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make(CUDABackend(CPU), plan_of("llama", scheduler={"max_num_seqs": 6}), checkpoints("llama"))

    def refuse(*args: Any) -> None:
        raise AssertionError("the eager path ran")

    greedy = SamplingParams(temperature=0)
    prompts = [Entry(seq, 0, [seq + 1, 2, 3], [seq], True) for seq in range(3)]
    monkeypatch.setattr(runner.table, "tensors", refuse)
    clean(runner)
    before = [tensor.clone() for tensor in runner.cache.tensors]
    runner.launch(StepBatch(0, 0, 0, [NewSequence(seq, greedy, [], 3) for seq in range(3)], [], prompts)).take()
    launched = [
        runner.launch(StepBatch(0, 1 + i, 0, [], [], [Entry(seq, 3 + i, [], [10 + seq] if i == 1 else [], True)
                                                      for seq in range(3)]))
        for i in range(3)
    ]  # fmt: skip
    assert [len(step.take().token_ids) for step in launched] == [3, 3, 3]
    for was, now in zip(before, runner.cache.tensors, strict=True):
        changed = (was != now).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert {one for one in changed if one < NUM_BLOCKS} == {0, 1, 2, 10, 11, 12}, (
            "padding wrote into a block of a sequence"
        )


def test_garbage_in_foreign_and_padding_blocks_reaches_nobody(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of("mistral", scheduler={"max_num_seqs": 5})
    runner = make(CUDABackend(CPU), plan, checkpoints("mistral"))
    world = World(7, plan.spec.vocab_size, 1)
    expected = run(world, make(CPUBackend(CPU), plan, checkpoints("mistral")).launch, 30)
    for tensor in runner.cache.tensors:
        tensor.fill_(float("nan"))  # a fresh block is cleared when a sequence gets it
    found = run(World(7, plan.spec.vocab_size, 1), runner.launch, 30)
    assert [step.token_ids for step in found] == [step.token_ids for step in expected]


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)])
def test_shards_and_stages_bring_the_same_ids(
    layout: tuple[int, int], plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    plan = plan_of("llama", *layout, scheduler={"max_num_seqs": 4})
    prompts = [[1, 2, 3], [4] * 11, [7, 8], [9]]
    answers = {}
    for backend_type in (CPUBackend, CUDABackend):
        gang = threads["ThreadGang"](plan, checkpoints("llama"), NUM_BLOCKS, backend_type(CPU))
        ids = [[] for _ in prompts]
        opened = [NewSequence(seq, SamplingParams(0.8, seed=seq), [], len(p)) for seq, p in enumerate(prompts)]
        entries = [Entry(seq, 0, p, list(range(8 * seq, 8 * seq + 8)), True) for seq, p in enumerate(prompts)]
        for number in range(12):
            for seq, (token_id,) in enumerate(execute(gang, StepBatch(0, number, 0, opened, [], entries))):
                ids[seq].append(token_id)
            opened = []
            entries = [Entry(s, len(p) + number, [ids[s][-1]], [], True) for s, p in enumerate(prompts)]
        answers[backend_type] = ids
    eager, static = answers.values()
    assert static == eager


def execute(gang: Any, step: StepBatch) -> list[list[int]]:
    results = [sampled for sampled in gang._all(lambda runner: runner.execute(step)) if sampled is not None]
    assert all(result.token_ids == results[0].token_ids for result in results)
    return results[0].token_ids


class AwaitedBackend(CUDABackend):
    """Ids are on the host only once they are waited for."""

    def __init__(self) -> None:
        super().__init__(CPU)

    def download(self, tensor: torch.Tensor) -> Any:
        download = LateDownload(tensor, random.Random(0))
        download.is_ready = lambda: download.is_here  # type: ignore[method-assign]
        return download


def test_penalties_count_ids_that_were_still_on_their_way(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    """What is drawn follows from how often each of three ids was drawn; more steps are in flight than the plan says."""
    plan = plan_of("llama", scheduler={"max_num_seqs": 2})
    sampling = SamplingParams(temperature=0, frequency_penalty=2.0, logit_bias={7: 60.0, 8: 59.0, 9: 57.0})
    found = []
    for backend in (CPUBackend(CPU), AwaitedBackend()):
        runner = make(backend, plan, checkpoints("llama"))
        prompt = Entry(0, 0, [1, 2], [0, 1, 2, 3, 4], True)
        launched = [runner.launch(StepBatch(0, 0, 0, [NewSequence(0, sampling, [], 2)], [], [prompt]))]
        launched += [
            runner.launch(StepBatch(0, number, 0, [], [], [Entry(0, 1 + number, [], [], True)]))
            for number in range(1, 12)
        ]
        found.append([step.take().token_ids for step in launched])  # type: ignore[union-attr]
        runner._sampling.settle()
        row = runner.table.rows[0]
        assert isinstance(row.ids, array)
        assert row.ids[2:].tolist() == [token_id for [[token_id]] in found[-1]]
    assert found[0] == found[1]
    assert {token_id for [[token_id]] in found[0]} == {7, 8, 9}


@pytest.mark.parametrize("num_ids", [1, 2])
def test_not_a_number_is_reported_and_never_looked_up(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, num_ids: int
) -> None:
    """In a decode step (one id) as in a prefill; the next step, launched already, goes on with some id."""
    runner = make(CUDABackend(CPU), plan_of("llama", scheduler={"max_num_seqs": 2}), checkpoints("llama"))
    opened = [NewSequence(0, SamplingParams(temperature=0), [], num_ids)]
    with monkeypatch.context() as patch:
        patch.setattr(runner.sampler, "sample", lambda *_: torch.tensor([NOT_A_NUMBER]))
        sick = runner.launch(StepBatch(0, 0, 0, opened, [], [Entry(0, 0, [1, 2][:num_ids], [0, 1], True)]))
    after = runner.launch(StepBatch(0, 1, 0, [], [], [Entry(0, num_ids, [], [], True)]))
    told, gone_on = sick.take(), after.take()
    assert told is not None and told.token_ids == [[NOT_A_NUMBER]]
    assert gone_on is not None and gone_on.token_ids[0][0] >= 0
    assert runner.table.rows[0].ids[num_ids] == 0
