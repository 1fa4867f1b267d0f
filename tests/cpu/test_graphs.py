"""Captured steps, by graphs that need no GPU: their ids, votes over shards, and that none outlives its epoch."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.decisions.model.plan import Plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda import static_step, transfer
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.cuda.graph_runner import CUDAGraphRunner
from actors.tensors.backends.cuda.static_step import StaticBuffers
from actors.tensors.runner import Runner
from actors.tensors.sampled_ids import SampledIds
from actors.words.messages import Bucket, Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives.interface import NeighborLost
from tests.fakes.fake_graphs import FakeGraphBackend, FakeGraphs, LateGraphBackend

CPU = torch.device("cpu")
worlds = runpy.run_path(str(Path(__file__).with_name("test_graph_runner.py")))
threads = runpy.run_path(str(Path(__file__).parent.parent / "families" / "threads.py"))
pytestmark = pytest.mark.timeout(120)


def make(plan: Plan, folder: Path) -> tuple[Runner, FakeGraphs]:
    backend = LateGraphBackend(CPU)
    runner = worlds["make"](backend, plan, folder)
    maker = backend.makers[-1]
    maker.inputs = runner.graphs._buffers.inputs
    return runner, maker


def test_graphs_bring_the_ids_of_plain_steps(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shape after the other is captured while steps run; each epoch begins without any graph."""
    monkeypatch.setattr(static_step, "_LARGEST_UPDATE", 2)  # the blocks of a prompt take several copies
    plan = plan_of("llama", scheduler={"max_num_seqs": 5, "depth": 2})
    plain = worlds["make"](CPUBackend(CPU), plan, checkpoints("llama"))
    runner, maker = make(plan, checkpoints("llama"))
    assert isinstance(runner.graphs, CUDAGraphRunner)
    assert {shape.is_decode for shape in runner.shapes} == {True, False}
    for seed in (20, 21):
        expected = worlds["run"](worlds["World"](seed, plan.spec.vocab_size, 2), plain.launch, 40)
        missing = list(runner.shapes)

        def launch(step: StepBatch, missing: list[Bucket] = missing) -> Any:
            if step.step % 3 == 0 and missing:
                assert runner.capture(missing.pop()) is None
            return runner.launch(step)

        found = worlds["run"](worlds["World"](seed, plan.spec.vocab_size, 2), launch, 40)
        assert [step.token_ids for step in found] == [step.token_ids for step in expected]
        assert maker.num_kept == len(runner.graphs.captured) == len(runner.shapes)
        assert sum(graph.num_replays > 1 for graph in maker.made) > 3, "graphs were in use"
        for each in (plain, runner):
            each.join(worlds["Alone"]())
            worlds["clean"](each)
        assert maker.num_kept == 0 and not runner.graphs.captured, "graphs hold the groups of their epoch"


@pytest.mark.parametrize("failure", [NeighborLost("aborted"), KeyboardInterrupt()])
def test_a_half_made_graph_is_given_up(
    failure: BaseException, plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    """Even while the exception, whose traceback knows it, is at hand: the group of the epoch is aborted then."""
    runner, maker = make(plan_of("llama", scheduler={"max_num_seqs": 2}), checkpoints("llama"))
    maker.failure = failure
    with pytest.raises(type(failure)):
        runner.capture(runner.shapes[0])
    assert len(maker.made) == 1 and maker.num_kept == 0


def test_a_graph_that_gives_something_else_is_not_used(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, maker = make(plan_of("llama", scheduler={"max_num_seqs": 2}), checkpoints("llama"))
    shape = runner.shapes[0]
    monkeypatch.setattr(maker, "rehearse", lambda work: work() + 1.0)
    reason = runner.capture(shape)
    assert reason is not None and "AssertionError" in reason
    assert maker.num_kept == 0
    maker.failure = RuntimeError("out of memory")
    assert runner.capture(shape) == "RuntimeError: out of memory"
    assert maker.num_kept == 0 and not runner.graphs.captured  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)])
def test_all_shards_have_a_graph_or_none_has(
    layout: tuple[int, int], plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    """Two rows decode beside a chunk of a third prompt, which ends in the next step."""
    plan = plan_of("llama", *layout, scheduler={"max_num_seqs": 4})
    backend = FakeGraphBackend()
    gangs = [threads["ThreadGang"](plan, checkpoints("llama"), 60, each) for each in (CPUBackend(CPU), backend)]
    runners = gangs[1].runners
    for maker in backend.makers:
        [runner] = [each for each in runners if each.graphs._make_graph is maker]
        maker.inputs = runner.graphs._buffers.inputs
    shapes = [shape for shape in runners[0].shapes if shape.num_tokens in (2, 4, 16)]
    reasons = []
    for shape in shapes:
        runners[0].graphs._make_graph.failure = RuntimeError("no room") if shape == shapes[0] else None
        reasons.append(gangs[1]._all(lambda runner, shape=shape: runner.capture(shape)))
    assert reasons[0][:2] == ["RuntimeError: no room", "another shard could not"]
    assert not any(any(found) for found in reasons[1:])
    assert len(runners[0].graphs.captured) == len(runners[1].graphs.captured) == len(shapes) - 1
    answers = [ids_of(gang) for gang in gangs]
    assert answers[0] == answers[1]
    assert all(any(graph.num_replays > 1 for graph in maker.made) for maker in backend.makers)


def ids_of(gang: Any) -> list[list[list[int]]]:
    greedy, prompts = SamplingParams(temperature=0), [[1, 2, 3], [4] * 7, list(range(5, 15))]
    opened = [[NewSequence(seq, greedy, [], len(prompts[seq])) for seq in seqs] for seqs in ((0, 1), (2,))]
    found = []
    first = [Entry(seq, 0, prompts[seq], [2 * seq, 2 * seq + 1, 40 + seq], True) for seq in (0, 1)]
    found.append(worlds["execute"](gang, StepBatch(0, 0, 0, opened[0], [], first)))
    rows = [Entry(seq, len(prompts[seq]), found[0][seq], [], True) for seq in (0, 1)]
    chunk = Entry(2, 0, prompts[2][:6], [20, 21, 22], False)
    found.append(worlds["execute"](gang, StepBatch(0, 1, 0, opened[1], [], [chunk, *rows])))
    rows = [Entry(seq, len(prompts[seq]) + 1, found[1][seq], [], True) for seq in (0, 1)]
    found.append(worlds["execute"](gang, StepBatch(0, 2, 0, [], [], [*rows, Entry(2, 6, prompts[2][6:], [], True)])))
    for number in range(3, 6):
        rows = [Entry(seq, len(prompts[seq]) + 2 + number - 3, found[-1][seq], [], True) for seq in (0, 1)]
        found.append(worlds["execute"](gang, StepBatch(0, number, 0, [], [], rows)))
    return found


def test_a_prefix_that_others_computed_is_read_from_its_blocks(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]
) -> None:
    """A sequence whose first blocks are another's brings their numbers, though none of its tokens is in them."""
    plan = plan_of("llama", scheduler={"max_num_seqs": 4})
    prompt = list(range(1, 14))
    found = []
    for backend in (CPUBackend(CPU), LateGraphBackend(CPU)):
        runner = worlds["make"](backend, plan, checkpoints("llama"))
        for shape in runner.shapes:
            runner.capture(shape)
        greedy = SamplingParams(temperature=0)
        whole = Entry(0, 0, prompt, [5, 6, 7, 8], True)
        first = runner.execute(StepBatch(0, 0, 0, [NewSequence(0, greedy, [], 13)], [], [whole]))
        rest = Entry(1, 8, prompt[8:], [5, 6, 9, 10], True)
        second = runner.execute(StepBatch(0, 1, 0, [NewSequence(1, greedy, prompt[:8], 13)], [0], [rest]))
        third = runner.execute(StepBatch(0, 2, 0, [], [], [Entry(1, 13, [], [], True)]))
        assert first.token_ids == second.token_ids
        found.append([first.token_ids, second.token_ids, third.token_ids])
    assert found[0] == found[1]


def test_padding_does_not_race_for_a_slot() -> None:
    """On a GPU, tokens that write other numbers into one slot make the check of a capture fail at random."""
    shapes, blocks = (Bucket(8, 8, 3, True), Bucket(512, 8, 32, False)), range(60, 60 + CUDABackend.num_padding_blocks)
    state = torch.rand(512, 4)
    buffers = StaticBuffers(shapes, 1, 8, blocks, SampledIds(8, 1, CPU), state, CPU)
    table = buffers.tables_PN[buffers.sampled_ids.padding]
    assert len(set(table.tolist())) == 32 and set(table.tolist()) <= set(blocks)
    buffers.pad_state()
    assert torch.equal(state, state[:1].expand(512, 4)) and state.abs().sum() > 0


class FakeEvent:
    """Ends when it is waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("copy")

    def synchronize(self) -> None:
        self.log.append("wait")


def test_no_buffer_is_written_to_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    ring = transfer.StagingRing(4, 3, CPU)
    ring._events = [FakeEvent(log) for _ in range(3)]  # type: ignore[misc]
    buffers, target = [], torch.zeros(4, dtype=torch.int32)
    for number in range(4):
        log.clear()
        buffers.append(ring.next())
        assert log == ["wait"], "the last copy of this buffer ends before it is handed out"
        buffers[-1].fill_(number)
        ring.send(target, slice(1, 3))
        assert log == ["wait", "copy"]
    assert target.tolist() == [0, 3, 3, 0]
    assert len({buffer.data_ptr() for buffer in buffers}) == 3 and buffers[0] is buffers[3]
