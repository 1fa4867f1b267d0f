"""Nothing waits for the device: real steps run on tensors that the host cannot read, for every kind of sampling."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.decisions.model.plan import Plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.launched import Launched
from actors.tensors.runner import Runner
from actors.tensors.sampling import truncation
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch, TokenLogprobs
from tests.fakes.device_tensors import DeviceTensor, HostWait, NoReading, SlowDownload, on_device, unwrapped

CPU = torch.device("cpu")
worlds = runpy.run_path(str(Path(__file__).with_name("test_graph_runner.py")))
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(0.9, seed=1),
    "top_k": SamplingParams(0.9, seed=2, top_k=5),
    "large top_k": SamplingParams(0.9, seed=3, top_k=20),
    "top_p": SamplingParams(0.9, seed=4, top_p=0.99),
    "top_k and top_p": SamplingParams(0.9, seed=5, top_k=20, top_p=0.9),
    "min_p": SamplingParams(0.9, seed=6, min_p=0.1),
    "repetition": SamplingParams(temperature=0, repetition_penalty=1.5),
    "presence": SamplingParams(0.9, seed=7, presence_penalty=1.0, frequency_penalty=0.5),
    "bias": SamplingParams(temperature=0, logit_bias={3: 2.0}, min_tokens=2, stop_ids=[1, 2]),
    "logprobs": SamplingParams(temperature=0, logprobs=3),
    "prompt logprobs": SamplingParams(temperature=0, logprobs=1, prompt_logprobs=2),
}


class AsyncBackend(CUDABackend):
    """A device that the host runs ahead of: nothing arrives before the end of the test."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.is_done = True

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        assert not isinstance(host, DeviceTensor)
        return host if self.is_done else on_device(host.clone())

    def download(self, tensor: torch.Tensor) -> Any:
        return SlowDownload(unwrapped(tensor), lambda: self.is_done)


@pytest.fixture(scope="module")
def runners(plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path]) -> tuple[Runner, Runner]:
    """On the CPU, and on a device that nobody waits for."""
    plan = plan_of("llama", scheduler={"max_num_seqs": 4, "depth": 4})
    plain, ahead = (
        worlds["make"](backend, plan, checkpoints("llama")) for backend in (CPUBackend(CPU), AsyncBackend())
    )
    return plain, ahead


def steps(params: SamplingParams) -> list[StepBatch]:
    """Two sequences of one kind and a greedy one: prompts, chunks beside decode rows, decode steps, a large step."""
    greedy = SamplingParams(temperature=0)
    asks = params.prompt_logprobs is not None
    opened = [NewSequence(seq, params, [], 3) for seq in (0, 1)]
    prompts = [Entry(seq, 0, [seq + 5, 2, 3], [seq, 10 + seq], True, asks) for seq in (0, 1)]
    chunk = Entry(2, 0, [7, 8, 9, 4, 5], [2, 12], False)
    mixed = [Entry(0, 3, [], [], True), Entry(1, 3, [], [], True), chunk]
    last = Entry(2, 5, [6, 7], [], True)
    rows = [[Entry(seq, 4 + i, [], [20 + seq] if i == 4 else [], True) for seq in (0, 1)] for i in range(4)]
    large = Entry(3, 0, [1 + i % 40 for i in range(70)], list(range(30, 50)), True)
    return [
        StepBatch(0, 0, 0, opened, [], prompts),
        StepBatch(0, 1, 0, [NewSequence(2, greedy, [], 7)], [], mixed),
        StepBatch(0, 2, 0, [], [], [*rows[0], last]),
        StepBatch(0, 3, 0, [], [], rows[1]),
        StepBatch(0, 4, 0, [NewSequence(3, params, [], 70)], [], [*rows[2], large]),
    ]


def pretend(runner: Runner) -> None:
    """From now on what the runner keeps on the device cannot be read."""
    buffers = runner.graphs._buffers  # type: ignore[union-attr]
    for owner, name in ((buffers, "inputs"), (buffers, "tables_PN"), (runner._sampled_ids, "_ids_PD")):
        setattr(owner, name, on_device(getattr(owner, name)))
    buffers._result = None
    runner.graphs._steps.clear()  # type: ignore[union-attr]


def launch(runner: Runner, batch: StepBatch) -> Launched:
    """As Runner.launch does, without inference mode: it knows no tensors of another kind."""
    with torch.no_grad():
        launched: Launched = Runner.launch.__wrapped__(runner, batch)  # type: ignore[attr-defined]
        return launched


def run(runner: Runner, batches: list[StepBatch], when_launched: Callable[[], None] = lambda: None) -> list[Any]:
    launched = [launch(runner, batch) for batch in batches]
    when_launched()
    results = [step.take() for step in launched]
    runner._sampling.settle()
    runner.launch(StepBatch(0, 99, 0, [], list(runner.table.rows), []))
    return results


def top_ids(logprobs: list[list[TokenLogprobs]]) -> list[list[list[int]]]:
    return [[told.top_ids for told in entry] for entry in logprobs]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits(kind: str, runners: tuple[Runner, Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "NUM_CANDIDATES", 8)
    plain, ahead = runners
    expected = run(plain, steps(KINDS[kind]))
    backend = ahead.backend
    assert isinstance(backend, AsyncBackend)
    pretend(ahead)
    backend.is_done = False

    def finish() -> None:
        backend.is_done = True

    with NoReading():
        found = run(ahead, steps(KINDS[kind]), finish)
    assert [step.token_ids for step in found] == [step.token_ids for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert top_ids(one.logprobs) == top_ids(other.logprobs)
        assert top_ids(one.prompt_logprobs) == top_ids(other.prompt_logprobs)


@pytest.mark.parametrize(
    "wait",
    [
        lambda logits: logits.sum().item(),
        lambda logits: logits.argmax(1).tolist(),
        lambda logits: logits[logits > 0],
        lambda logits: logits.nonzero(),
        lambda logits: bool((logits > 0).all()),
        lambda logits: logits.cpu(),
        lambda logits: logits.argmax(1).unique(),
    ],
)
def test_a_wait_is_found(
    wait: Callable[[torch.Tensor], Any], runners: tuple[Runner, Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runners[1]
    backend, sample = runner.backend, runner.sampler.sample
    assert isinstance(backend, AsyncBackend)
    pretend(runner)
    monkeypatch.setattr(backend, "is_done", False)
    monkeypatch.setattr(runner.sampler, "sample", lambda logits, batch: [wait(logits), sample(logits, batch)][1])
    with NoReading(), pytest.raises(HostWait):
        launch(runner, steps(KINDS["greedy"])[0])
    backend.is_done = True
    runner.join(worlds["Alone"]())
