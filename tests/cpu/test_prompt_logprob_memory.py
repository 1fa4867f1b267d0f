"""Log-probabilities of a prompt take memory for 256 of its ids at a time, however long the prompt is."""

import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.decisions.model.plan import make_plan
from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Event, Request, SamplingParams, StepBatch, StepResult
from cluster.collectives.interface import LoneShard
from configs.config import Config

VOCAB = 32_000
BOUND_ROWS = 256  # of logits in a step


class Alone:
    stage = LoneShard()
    previous = None
    next = None
    feedback = None


class OneRank:
    """Executes where it is submitted; remembers the most rows of logits."""

    shapes = ()

    def __init__(self, runner: Runner) -> None:
        self.runner, self.changed = runner, threading.Condition()
        self.results: list[StepResult] = []
        self.woken = False
        self.most_rows = 0

    def submit(self, step: StepBatch) -> None:
        sampled = self.runner.execute(step)
        asked = sum(len(entry.ids) for entry in step.entries if entry.prompt_logprobs)
        self.most_rows = max(self.most_rows, asked)
        if step.entries and sampled is not None:
            with self.changed:
                told = (sampled.token_ids, sampled.logprobs, sampled.prompt_logprobs)
                self.results.append(StepResult(step.epoch, step.step, *told))
                self.changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        with self.changed:
            self.changed.wait_for(lambda: self.results or self.woken, timeout_s)
            results, self.results, self.woken = self.results, [], False
            return results

    def wake(self) -> None:
        with self.changed:
            self.woken = True
            self.changed.notify_all()

    def close(self) -> None: ...


def make_runner(folder: Path) -> Runner:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=8192,
        dtype="float32",
        pad_token_id=None,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    asked = {"model": {"source": str(folder)}, "scheduler": {"depth": 1}}
    runner = Runner(
        make_plan(Config.model_validate(asked), read_spec(folder)), 0, Alone(), CPUBackend(torch.device("cpu"))
    )
    runner.load(folder)
    runner.allocate_cache(513)
    runner.warm_up()  # kernels are compiled then, which takes memory of its own
    return runner


def status(name: str) -> int:
    """A field of the kernel's account of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """The high-water mark falls to what is taken now: proc_pid_clear_refs(5)."""
    Path("/proc/self/clear_refs").write_text("5")


def echo(runner: Runner, num_ids: int) -> OneRank:
    executor, ended, told = OneRank(runner), threading.Event(), []

    def take(events: list[Event]) -> None:
        for event in events:
            told.extend(event.prompt_logprobs)
            if event.finish_reason:
                ended.set()

    plan = runner.plan
    settings = SchedulerSettings(plan.block_size, 4, 2048, 1, 1)
    engine = Engine(executor, settings, 513, take)
    engine.start()
    prompt = [number * 7 % VOCAB for number in range(num_ids)]
    engine.add(Request("echo", prompt, 1, SamplingParams(temperature=0, prompt_logprobs=5, logprobs=5)))
    assert ended.wait(60)
    engine.close()
    assert len(told) == num_ids - 1
    return executor


def measure(folder: Path) -> tuple[int, dict[int, int]]:
    """Most rows of logits in a step, and the peak in bytes above what was taken before, by ids in the prompt."""
    torch.set_num_threads(1)
    runner = make_runner(folder)
    before, rows, peaks = status("VmRSS"), 0, {}
    for num_ids in (1000, 2000, 4000, 8000):
        forget_peak()
        rows = max(rows, echo(runner, num_ids).most_rows)
        peaks[num_ids] = status("VmHWM") - before
    return rows, peaks


@pytest.mark.timeout(120)
def test_the_peak_does_not_grow_with_the_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In a process of its own: how an allocator that other tests have filled places these blocks is not the question.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        rows, peaks = process.submit(measure, tmp_path).result()
    one_step = BOUND_ROWS * VOCAB * 4
    with capsys.disabled():
        shown = ", ".join(f"{num_ids} ids {peak / 1e6:.0f} MB" for num_ids, peak in peaks.items())
        print(f"\npeak of echo with logprobs: {shown}; logits of one step {one_step / 1e6:.0f} MB")
    assert rows == BOUND_ROWS
    assert peaks[8000] < 8 * one_step < 8000 * VOCAB * 4
    assert peaks[8000] < 1.5 * peaks[4000]
