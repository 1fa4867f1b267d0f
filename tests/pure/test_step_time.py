"""The step-time model: what steps were seen to take decides how many prompt tokens a step may carry."""

import random

import pytest

from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.settings import SchedulerSettings
from actors.decisions.schedule.stats import Stats
from actors.decisions.schedule.step_time import StepTimeModel
from actors.words.messages import Entry, Request, SamplingParams, StepBatch, StepResult

STEP_S, ROW_S, TOKEN_S = 0.024, 0.002, 0.0004
DECODE_S = STEP_S + 8 * ROW_S  # of a step that decodes eight rows


def step(num_single: int, num_prompt: int) -> StepBatch:
    entries = [Entry(seq, 9, [], [], True) for seq in range(num_single)]
    if num_prompt:
        entries.append(Entry(99, 0, [1] * num_prompt, [], True))
    return StepBatch(0, 0, 0, [], [], entries)


def seconds(batch: StepBatch) -> float:
    num_prompt = sum(len(entry.ids) for entry in batch.entries if len(entry.ids) > 1)
    num_rows = sum(len(entry.ids) <= 1 for entry in batch.entries)
    return STEP_S + ROW_S * num_rows + TOKEN_S * num_prompt


def taught(depth: int = 1, seed: int = 0, num_lanes: int = 1) -> StepTimeModel:
    """A model that has seen a few hundred steps of that device, `depth` of them in flight at a time."""
    model, world, now, ends = StepTimeModel(num_lanes), random.Random(seed), 5.0, []
    for _ in range(300):
        batch = step(world.choice([0, 8, 8, 8]), world.choice([0, 0, 200, 1000]))
        if batch.entries:
            model.launched(batch, now)
            ends.append((ends[-1] if ends and ends[-1] > now else now) + seconds(batch))
            if len(ends) >= depth:
                now = ends[-depth]
                model.completed(now)
    return model


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_mixed_step_takes_little_more_than_twice_one_that_decodes(depth: int) -> None:
    tokens = taught(depth).prefill_tokens(1, 8, 2048)
    assert 2.0 * DECODE_S < DECODE_S + tokens * TOKEN_S < 2.4 * DECODE_S
    assert taught(depth).prefill_tokens(8, 8, 2048) == tokens


def test_prompts_that_outnumber_the_running_may_take_more() -> None:
    model = taught()
    one = model.prefill_tokens(1, 8, 2048)
    assert model.prefill_tokens(1, 8, one - 1) == one - 1
    assert model.prefill_tokens(32, 8, 2048) == pytest.approx(4 * one, abs=4)


def test_without_anybody_waiting_for_a_token_there_is_no_limit() -> None:
    assert taught().prefill_tokens(3, 0, 2048) == 2048
    assert StepTimeModel().prefill_tokens(1, 8, 2048) == 2048  # nothing is known yet


def test_in_a_pipeline_prompts_come_in_portions_so_that_no_stage_waits_for_long() -> None:
    model = taught(num_lanes=2)
    alone = model.prefill_tokens(8, 0, 2048)
    assert alone * TOKEN_S == pytest.approx(2 * (STEP_S + ROW_S), rel=0.05)
    beside = model.prefill_tokens(64, 8, 2048)
    assert beside * TOKEN_S == pytest.approx(2 * (STEP_S + 4 * ROW_S), rel=0.05)  # half of the rows are in each lane
    assert model.prefill_tokens(1, 8, 2048) < beside
    assert StepTimeModel(num_lanes=2).prefill_tokens(8, 0, 2048) == 2048  # nothing is known yet


def test_what_steps_cost_is_learnt_where_each_of_them_carries_prompts() -> None:
    model, world, now = StepTimeModel(), random.Random(0), 1.0
    for num_rows, slower in [(4, 1.0)] * 100 + [(32, 1.0)] * 200 + [(32, 9.0)] * 200 + [(32, 1.0)] * 200:
        batch = step(num_rows + world.randrange(4), world.randrange(20, 80))
        model.launched(batch, now)
        now += slower * seconds(batch) * world.uniform(0.9, 1.1)
        model.completed(now)
    assert model.prefill_tokens(1, 32, 2048) == pytest.approx(1.3 * (STEP_S + 32 * ROW_S) / TOKEN_S, rel=0.15)
    assert model.seconds.tolist() == pytest.approx([STEP_S, ROW_S, TOKEN_S], rel=0.5)


@pytest.mark.parametrize("paired", [0.2, 1.0])
def test_results_that_come_together_count_as_one(paired: float) -> None:
    model, world, now = StepTimeModel(), random.Random(1), 1.0
    for _ in range(300):
        batches = [step(8, world.choice([0, 40, 80])) for _ in range(1 + (world.random() < paired))]
        for batch in batches:
            model.launched(batch, now)
        now += sum(map(seconds, batches))
        for _ in batches:
            model.completed(now + 1e-6)
    assert model.prefill_tokens(1, 8, 2048) == pytest.approx(1.3 * DECODE_S / TOKEN_S, rel=0.1)


def test_what_a_token_costs_is_not_forgotten_while_nobody_sends_a_prompt() -> None:
    model, now = StepTimeModel(), 1.0

    def run(num_steps: int, slower_each: float, prompt_every: int) -> None:
        nonlocal now
        for number in range(num_steps):
            batch = step(8, 20 if prompt_every and number % prompt_every == 0 else 0)
            model.launched(batch, now)
            now += seconds(batch) + DECODE_S * slower_each * number
            model.completed(now)

    run(300, 0.0, prompt_every=30)
    before = model.prefill_tokens(1, 8, 2048)
    run(200, 0.001, prompt_every=0)  # contexts grow: a fifth more
    assert before <= model.prefill_tokens(1, 8, 2048) <= 1.25 * before


def test_tokens_that_seem_to_cost_nothing_are_limited_all_the_same() -> None:
    model, now = StepTimeModel(), 1.0
    for number in range(100):
        model.launched(step(8, 20 * (number % 2)), now)
        now += DECODE_S
        model.completed(now)
    assert 16 < model.prefill_tokens(1, 8, 2048) < 2048


def test_slow_prompts_do_not_starve() -> None:
    model, now = StepTimeModel(), 1.0
    for batch, took_s in ((step(8, 0), 0.001), (step(0, 100), 50.0)):
        model.launched(batch, now)
        now += took_s
        model.completed(now)
    assert model.prefill_tokens(1, 8, 2048) == 16


def test_the_scheduler_keeps_to_it_and_running_streams_go_on() -> None:
    now = [0.0]
    settings = SchedulerSettings(16, 16, 2048, num_lanes=1)
    scheduler = Scheduler(settings, num_blocks=1024, stats=Stats(lambda: now[0]))
    waits: list[float] = []

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            batch = scheduler.next_step()
            if batch is None:
                return
            now[0] += seconds(batch)
            waits.append(seconds(batch))
            scheduler.complete(StepResult(0, batch.step, [[7] for entry in batch.entries if entry.sample]))

    for name in range(8):
        scheduler.add(Request(f"stream{name}", [1] * 64, 400, SamplingParams(temperature=0)))
    run(20)
    waits.clear()
    began = now[0]
    scheduler.add(Request("long", [2] * 1500, 1, SamplingParams(temperature=0)))
    while scheduler.num_live == 9:
        run(1)
    assert max(waits) <= 2.5 * DECODE_S
    assert now[0] - began <= 2 * 1500 * TOKEN_S
