"""Lanes take turns: whenever they got work, no lane has two steps in a row where another has something to compute.

And their steps are alike: prompts go with those of every lane.
"""

from collections import deque

import pytest

from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.settings import SchedulerSettings
from actors.decisions.schedule.stats import Stats
from actors.words.messages import Request, SamplingParams, StepBatch, StepResult


class Pipeline:
    """Ends steps in the order of their submission; remembers whose they were."""

    def __init__(self, num_lanes: int, depth: int, max_num_batched_tokens: int = 2048) -> None:
        settings = SchedulerSettings(16, 16, max_num_batched_tokens, num_lanes, depth)
        self.scheduler = Scheduler(settings, num_blocks=256, stats=Stats(lambda: 0.0))
        self.flights: deque[StepBatch] = deque()
        self.steps: list[StepBatch] = []

    def add(self, name: str, max_tokens: int, prompt_len: int = 3) -> None:
        prompt = [self.scheduler.num_live + 1] * prompt_len  # of its own: nothing of it is cached
        self.scheduler.add(Request(name, prompt, max_tokens, SamplingParams(temperature=0)))
        self.submit()

    def submit(self) -> None:
        while step := self.scheduler.next_step():
            if step.entries:
                self.steps.append(step)
                self.flights.append(step)

    @property
    def turns(self) -> list[int]:
        return [step.lane for step in self.steps]

    def advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if not self.flights:
                return
            step = self.flights.popleft()
            ids = [[7] for entry in step.entries if entry.sample]
            self.scheduler.complete(StepResult(step.epoch, step.step, ids))
            self.submit()


@pytest.mark.parametrize(("num_lanes", "depth"), [(2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("pause", [0, 1, 2, 5])
def test_lanes_that_come_later_fall_in_step(num_lanes: int, depth: int, pause: int) -> None:
    pipeline = Pipeline(num_lanes, depth)
    for lane in range(num_lanes):
        pipeline.add(f"r{lane}", 200)
        pipeline.advance(pause)
    first = len(pipeline.turns)
    pipeline.advance(60)
    turns = pipeline.turns[first:]
    assert len(turns) >= 60, "and nobody waits for good"
    assert all(len(set(turns[at : at + num_lanes])) == num_lanes for at in range(len(turns) - num_lanes)), turns


def test_a_lane_alone_waits_for_nobody() -> None:
    pipeline = Pipeline(3, 2)
    pipeline.add("short", 3)
    pipeline.add("long", 50)
    pipeline.advance(12)
    assert len(pipeline.flights) == 2, "all that the depth allows"
    pipeline.advance(100)
    assert pipeline.scheduler.num_live == 0
    assert len(pipeline.turns) <= 3 + 50 + 4


def test_chunks_of_a_prompt_follow_each_other_without_waiting() -> None:
    pipeline = Pipeline(3, 2, max_num_batched_tokens=32)
    pipeline.add("long", 1, prompt_len=5 * 32 + 27)
    assert [len(step.entries[0].ids) for step in pipeline.flights] == [32] * 5, "the last one belongs to the first lane"
    assert pipeline.turns == [0, 1, 2, 0, 1]
    pipeline.advance(1)
    assert pipeline.turns == [0, 1, 2, 0, 1, 0]
    pipeline.advance(5)
    assert pipeline.scheduler.num_live == 0


def test_a_prompt_goes_with_the_steps_of_both_lanes() -> None:
    pipeline = Pipeline(2, 2, max_num_batched_tokens=20)
    for name in range(8):
        pipeline.add(f"r{name}", 200)
        pipeline.advance(3)
    pipeline.add("long", 200, prompt_len=300)
    first = len(pipeline.steps)
    pipeline.advance(40)
    chunks = [sum(len(entry.ids) for entry in step.entries if len(entry.ids) > 1) for step in pipeline.steps[first:]]
    assert chunks[:18] == [16] * 18
    assert sum(chunks) == 300
    assert {len(step.entries) for step in pipeline.steps[-4:]} == {4, 5}


def test_of_those_that_wait_the_lowest_priority_begins_first_and_nothing_is_taken_from_those_that_run() -> None:
    scheduler = Scheduler(SchedulerSettings(16, 1, 64, 1, 1), num_blocks=256, stats=Stats(lambda: 0.0))
    numbers = {"running": 0, "late": 5, "first": 0, "urgent": -2, "second": 0}
    for name, priority in numbers.items():
        scheduler.add(Request(name, [1, 2, 3], 3, SamplingParams(temperature=0), priority=priority))
        if name == "running":
            step = scheduler.next_step()
    ended = []
    while step is not None:
        results = [[7] for entry in step.entries if entry.sample]
        events = scheduler.complete(StepResult(step.epoch, step.step, results)) if step.entries else []
        ended += [event.request_id for event in events if event.finish_reason]
        step = scheduler.next_step()
    assert ended == ["running", "urgent", "first", "second", "late"]
