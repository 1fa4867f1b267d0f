"""The engine lets real ranks capture their steps while it serves, in each epoch anew; the ids are Transformers' own."""

import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.remote.engine import Engine
from actors.words.messages import Request

ranks = runpy.run_path(str(Path(__file__).with_name("test_engine_on_ranks.py")))
DEVICE = "tests.fakes.fake_graphs:LateGraphBackend"
PROMPTS = [[1, 2, 3], list(range(5, 26)), [7] * 9, [4, 8]]
NUM_NEW = 12


@pytest.fixture(scope="module")
def expected(checkpoints: Callable[[str], Path]) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), attn_implementation="eager").eval()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        answer = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False)
        answers.append(answer[0, len(prompt) :].tolist())
    return answers


@pytest.mark.timeout(180)
def test_graphs_come_while_the_ranks_serve(
    pool: Any, plan_of: Callable[..., Any], checkpoints: Callable[[str], Path], expected: list[list[int]]
) -> None:
    """Two shards and two stages; ids reach the hosts late, so that the first stage, too, reads them on its device."""
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "depth": 2}
    plan = plan_of("llama", 2, 2, model={"max_model_len": ranks["MAX_MODEL_LEN"]}, scheduler=settings)
    gang = ranks["LocalGang"](pool, plan, checkpoints("llama"), DEVICE)
    try:
        serve(gang, plan, 0, expected, num_rounds=2)  # while shapes are captured; over their graphs
        gang.begin_epoch(1)
        serve(gang, plan, 1, expected, num_rounds=1)
    finally:
        gang.close()


def serve(gang: Any, plan: Any, epoch: int, expected: list[list[int]], num_rounds: int) -> None:
    """All prompts at once, in each round; a round ends when all shapes are captured."""
    assert len(gang.channel.shapes) == 4, "1, 2 and 4 rows, and 16 tokens"
    executor, events = ranks["Lent"](gang.channel), ranks["Events"]()
    engine = Engine(executor, plan.scheduler, ranks["LARGE"], events.take)
    engine._scheduler.epoch = epoch
    engine.start()
    try:
        for number in range(num_rounds):
            requests = [Request(f"{number}-{i}", prompt, NUM_NEW, ranks["GREEDY"]) for i, prompt in enumerate(PROMPTS)]
            for request in requests:
                engine.add(request)
            events.wait_for(requests)
            assert [events.ids[request.request_id] for request in requests] == expected
            until(lambda: engine.snapshot().graphs.num_captured == len(executor.shapes))
        until(lambda: all(seconds.get("capture", 0) > 0 for seconds in gang.channel.seconds.values()))
        assert not engine.snapshot().graphs.failed
    finally:
        engine.close()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ranks["PATIENCE_S"]
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
