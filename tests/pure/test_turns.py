"""Lanes take turns: whenever they got work, no lane has two steps in a row where another has something to compute."""

from collections import deque

import pytest

from actors.decisions.scheduler import Scheduler, SchedulerSettings
from actors.words.messages import Request, SamplingParams, StepBatch, StepResult


class Pipeline:
    """Ends steps in the order of their submission; remembers whose they were."""

    def __init__(self, num_lanes: int, depth: int) -> None:
        self.scheduler = Scheduler(SchedulerSettings(256, 16, 16, 2048, num_lanes, depth))
        self.flights: deque[StepBatch] = deque()
        self.turns: list[int] = []

    def add(self, name: str, max_tokens: int) -> None:
        self.scheduler.add(Request(name, [1, 2, 3], max_tokens, SamplingParams(temperature=0)))
        self.submit()

    def submit(self) -> None:
        while step := self.scheduler.next_step():
            if step.entries:
                self.turns.append(step.lane)
                self.flights.append(step)

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
