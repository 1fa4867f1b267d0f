"""What grammars cost: tokens/s of streams that each follow a schema of their own, beside the same streams without.

    python benchmarks/grammar_speed.py                  # CPU: the forward waits, as for a device, until 10 ms are over
    python benchmarks/grammar_speed.py --device cuda    # Llama 8B's shape, random weights

One rank, the real engine, a vocabulary of 128,000. Every request has another schema, so that each is compiled while the
others run; END is never likely, so that all write the same number of tokens. Both kinds take turns, and each figure is
the median of the rounds. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.decisions.model.plan import make_plan
from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.launched import Launched
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Event, Request, SamplingParams, StepBatch, StepResult
from benchmarks.gpu_stages import random_model
from configs.config import Config
from tests.fakes.large_tokenizer import END_ID, save_large_tokenizer
from tests.fakes.random_schemas import random_schema

STREAMS = (1, 8, 32)
NUM_TOKENS = 96
FORWARD_S = 0.01
PROMPT, MAX_MODEL_LEN = 32, 256


class InProcess:
    """An executor over one runner of this process: a thread launches the steps, and looks for their ends as a rank."""

    shapes = ()

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.steps: deque[StepBatch] = deque()
        self.results: deque[StepResult] = deque()
        self.changed = threading.Condition()
        self.is_woken = self.is_closed = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, step: StepBatch) -> None:
        with self.changed:
            self.steps.append(step)
            self.changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        with self.changed:
            self.changed.wait_for(lambda: self.results or self.is_woken, timeout_s)
            self.is_woken = False
            found = list(self.results)
            self.results.clear()
            return found

    def wake(self) -> None:
        with self.changed:
            self.is_woken = True
            self.changed.notify_all()

    def check(self) -> None: ...

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
        self.thread.join(20)

    def run(self) -> None:
        launched: deque[tuple[StepBatch, Launched]] = deque()
        while not self.is_closed:
            with self.changed:
                self.changed.wait_for(lambda: self.steps or self.is_closed, 5e-5 if launched else 1.0)
                step = self.steps.popleft() if self.steps else None
            if step is not None:
                launched.append((step, self.runner.launch(step)))
            while launched and launched[0][1].is_ready():
                done, result = launched.popleft()
                sampled = result.take()
                if done.entries and sampled is not None:
                    with self.changed:
                        self.results.append(StepResult(done.epoch, done.step, **vars(sampled)))
                        self.changed.notify_all()


def slowed(runner: Runner) -> None:
    """Let each forward take FORWARD_S, while the host's cores are free, as with a device."""
    forward = runner.forward

    def slow(*given: Any) -> torch.Tensor:
        until = time.perf_counter() + FORWARD_S
        output = forward(*given)
        time.sleep(max(0.0, until - time.perf_counter()))
        return output

    runner.forward = slow  # type: ignore[method-assign]


def make_runner(device: str, folder: Path) -> Runner:
    """A rank with random weights, its graphs captured where the device has them, and its vocabulary read."""
    settings = {"max_num_seqs": max(STREAMS), "depth": 2}
    if device == "cuda":
        plan = random_model.plan_of("llama8b", "bfloat16", max_model_len=MAX_MODEL_LEN, **settings)
        num_blocks = max(STREAMS) * plan.num_blocks_for_longest
        runner = random_model.random_runner(plan, torch.device("cuda:0"), num_blocks, "llama8b")
        runner._grammars.load(folder)
        for shape in sorted(runner.shapes, reverse=True):
            runner.capture(shape)
    else:
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        rest = {"intermediate_size": 96, "vocab_size": 128_256, "max_position_embeddings": 512}
        config = LlamaConfig(**shape, **rest, bos_token_id=None, eos_token_id=None)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        asked = Config(model={"source": str(folder), "max_model_len": MAX_MODEL_LEN}, scheduler=settings)
        plan = make_plan(asked, read_spec(folder))
        backend = CPUBackend(torch.device("cpu"))
        backend.set_up()
        runner = Runner(plan, 0, random_model.Alone(0, 1), backend)
        runner.load(folder)
        runner.allocate_cache(max(STREAMS) * plan.num_blocks_for_longest)
        runner.warm_up()
        slowed(runner)
    runner._grammars._compiled._vocabulary.result()
    return runner


def tokens_per_s(runner: Runner, num_streams: int, first_schema: int | None) -> float:
    """Of so many streams at once; `first_schema`: the number of the first one's schema, None without."""
    ends, errors, changed = set[str](), list[str](), threading.Condition()

    def deliver(events: list[Event]) -> None:
        with changed:
            ends.update(event.request_id for event in events if event.finish_reason)
            errors.extend(event.error for event in events if event.error)
            changed.notify_all()

    plan = runner.plan
    settings = SchedulerSettings(plan.block_size, max(STREAMS), 512, num_lanes=1, depth=2, prefix_cache=False)
    executor = InProcess(runner)
    engine = Engine(executor, settings, runner.num_blocks, deliver)
    engine.start()
    requests = []
    for number in range(num_streams):
        grammar = None if first_schema is None else long_grammar(first_schema + number)
        sampling = SamplingParams(1.0, seed=number, logit_bias={END_ID: -100.0}, grammar=grammar)
        requests.append(Request(str(number), [7 + number] * PROMPT, NUM_TOKENS, sampling, frozenset([END_ID])))
    began = time.perf_counter()
    for request in requests:
        engine.add(request)
    with changed:
        assert changed.wait_for(lambda: len(ends) == num_streams, 600)
    assert not errors, errors
    seconds = time.perf_counter() - began
    time.sleep(0.2)  # what is in flight ends
    engine.close()
    assert not runner.table.rows
    return num_streams * NUM_TOKENS / seconds


def long_grammar(number: int) -> str:
    """Answers of many items, each as a schema of its own says: none ends before NUM_TOKENS."""
    item = random_schema(number)
    schema = {"$defs": item.pop("$defs", {}), "type": "array", "items": item, "minItems": 50}
    return LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_large_tokenizer(Path(folder))
        runner = make_runner(args.device, Path(folder))
    tokens_per_s(runner, 1, 10_000)  # the vocabulary is read, and one-time work done
    ratios, next_schema = dict[int, float](), 0
    for num_streams in STREAMS:
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.rounds):
            for has_grammar in (False, True):
                found[has_grammar].append(tokens_per_s(runner, num_streams, next_schema if has_grammar else None))
            next_schema += num_streams
        without, constrained = statistics.median(found[False]), statistics.median(found[True])
        ratios[num_streams] = round(constrained / without, 3)
        print(
            f"{num_streams:3} streams: {without:7.0f} tokens/s without, {constrained:7.0f} with, {ratios[num_streams]}"
        )
    print(json.dumps({"device": args.device, "ratio": ratios}))


if __name__ == "__main__":
    main()
