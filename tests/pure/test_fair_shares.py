"""Whose turn it is: keys that wait share the engine by tokens, in random worlds, whatever each of them sends."""

import itertools
import random

import pytest

from actors.decisions.schedule.fair_shares import FairShares
from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.settings import SchedulerSettings
from actors.words.messages import Request, SamplingParams
from tests.fakes.fake_executor import FakeExecutor

KEYS = ("greedy", "modest", "slow")


class World:
    """Keys that always have something waiting, with prompts and answers of lengths of their own."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        self.keys = KEYS[: rng.randint(2, 3)]
        self.lengths = {key: (rng.randint(1, 40), rng.randint(1, 30)) for key in self.keys}
        self.backlogs = {key: rng.choice([2, 5, 40]) for key in self.keys}
        self.settings = SchedulerSettings(
            4, rng.randint(1, 6), 64, num_lanes=rng.randint(1, 2), depth=rng.randint(1, 2)
        )
        self.scheduler = Scheduler(self.settings, 200)
        self.executor = FakeExecutor(block_size=4)
        self.owner: dict[str, str] = {}
        self.num_waiting = dict.fromkeys(self.keys, 0)
        self.served = dict.fromkeys(self.keys, 0)

    def refill(self) -> None:
        """Let every key have its backlog again."""
        live = self.scheduler.num_ids
        alive = dict.fromkeys(self.keys, 0)
        for name in live:
            alive[self.owner[name]] += 1
        for key in self.keys:
            for _ in range(self.settings.max_num_seqs + self.backlogs[key] - alive[key]):
                num_prompt, num_answer = self.lengths[key]
                name = f"{key} {len(self.owner)}"
                self.owner[name] = key
                ids = [self.random.randrange(900) for _ in range(num_prompt)]
                self.scheduler.add(Request(name, ids, num_answer, SamplingParams(0.0), key=key))

    def step(self) -> None:
        """One step, submitted and completed."""
        if step := self.scheduler.next_step():
            self.executor.submit(step)
        for result in self.executor.wait(0):
            self.scheduler.complete(result)

    def tokens(self) -> dict[str, int]:
        """Served so far, by key."""
        usage = self.scheduler.stats.by_key
        return {key: usage[key].num_prompt + usage[key].num_generated if key in usage else 0 for key in self.keys}


SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(8, 80))]


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_that_always_wait_get_the_same_tokens(seed: int) -> None:
    """The paper's bound: twice what may run at once, whatever backlogs and lengths; it does not grow."""
    world = World(seed)
    bound = 2 * world.settings.max_num_seqs * max(sum(lengths) for lengths in world.lengths.values())
    for _ in range(1000):
        world.refill()
        world.step()
        for one, other in itertools.combinations(world.tokens().values(), 2):
            assert abs(one - other) <= bound
    assert min(world.tokens().values()) > 2 * bound, "too short to show anything"


def test_who_comes_back_starts_level_with_those_that_wait() -> None:
    shares = FairShares()
    shares.take_turn("busy", 1000)
    shares.arrive("back", ["busy"])
    assert shares.served("back") == 1000
    shares.take_turn("busy", 500)
    shares.arrive("new", [])
    assert shares.served("new") == 1500, "nobody waits: level with whoever had the last turn"
    shares.arrive("busy", ["back"])
    assert shares.served("busy") == 1500, "a pause takes nothing away"


def test_a_key_without_rivals_is_served_in_order_and_a_rival_goes_next() -> None:
    scheduler, executor = Scheduler(SchedulerSettings(4, 1, 64, num_lanes=1), 100), FakeExecutor(block_size=4)
    for number in range(6):
        scheduler.add(Request(f"a{number}", [1, 2, 3], 2, SamplingParams(0.0), key="a"))
    ended: list[str] = []
    while scheduler.num_live:
        if step := scheduler.next_step():
            executor.submit(step)
        for result in executor.wait(0):
            ended += [event.request_id for event in scheduler.complete(result) if event.finish_reason]
        if ended == ["a0", "a1"] and scheduler.num_live == 4:
            scheduler.add(Request("b0", [1, 2, 3], 2, SamplingParams(0.0), key="b"))
    assert ended == ["a0", "a1", "a2", "b0", "a3", "a4", "a5"]


def test_cached_tokens_of_a_prompt_do_not_count_and_keys_share_no_prefixes() -> None:
    scheduler, executor = Scheduler(SchedulerSettings(4, 4, 64, num_lanes=1), 100), FakeExecutor(block_size=4)
    prompt = list(range(17))
    for name, key in (("1", "a"), ("2", "a"), ("3", "b")):
        scheduler.add(Request(name, prompt, 1, SamplingParams(0.0), key=key))
        while scheduler.num_live:
            if step := scheduler.next_step():
                executor.submit(step)
            for result in executor.wait(0):
                scheduler.complete(result)
    usage = scheduler.stats.by_key
    assert (usage["a"].num_prompt, usage["a"].num_cached, usage["a"].num_generated) == (34, 16, 2)
    assert (usage["b"].num_prompt, usage["b"].num_cached, usage["b"].num_generated) == (17, 0, 1)
    assert scheduler._shares.served("a") == 34 - 16 + 2


@pytest.mark.parametrize(("num_dealt_steps", "charged"), [(0, 0), (1, 0), (2, 8), (3, 9)])
def test_what_ends_before_it_was_computed_does_not_count(num_dealt_steps: int, charged: int) -> None:
    scheduler, executor = Scheduler(SchedulerSettings(4, 1, 8, num_lanes=1), 100), FakeExecutor(block_size=4)
    scheduler.add(Request("1", list(range(9)), 9, SamplingParams(0.0), key="a"))
    if num_dealt_steps:  # dealt, and so many steps but one of 8 ids each
        scheduler._waiting.deal(scheduler._lanes, scheduler._kv_cache, 1, [])
    for _ in range(num_dealt_steps - 1):
        for result in executor.wait(0):
            scheduler.complete(result)
        step = scheduler.next_step()
        assert step is not None
        executor.submit(step)
    scheduler.finish("1")
    assert scheduler._shares.served("a") == charged
