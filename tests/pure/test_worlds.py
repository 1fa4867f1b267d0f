"""Random worlds: arrivals, lengths, aborts, tiny caches, lanes and depths, against a reference that knows no paging."""

import random

import pytest

from actors.decisions.scheduler import Scheduler, SchedulerSettings
from actors.remote.fake_executor import FakeExecutor, next_id
from actors.words.messages import Event, Request, SamplingParams

VOCAB_SIZE = 97


def brute_force(request: Request) -> tuple[list[int], str]:
    """All ids that a request yields, alone, without paging, and why it ends."""
    ids, generated = list(request.prompt_ids), []
    while True:
        generated.append(next_id(ids + generated, VOCAB_SIZE, request.sampling.seed or 0))
        if generated[-1] in request.stop_token_ids:
            return generated, "stop"
        if len(generated) == request.max_tokens:
            return generated, "length"


class World:
    """One random world, run to its end."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 16])
        max_num_seqs = rng.randint(1, 8)
        self.settings = SchedulerSettings(
            num_blocks=max(1, rng.randint(12, 60) // block_size),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 100]),
            num_lanes=rng.randint(1, 4),
            depth=rng.randint(1, 3),
            prefix_cache=rng.random() < 0.5,
        )
        self.executor = FakeExecutor(VOCAB_SIZE, block_size, is_manual=True)
        self.scheduler = Scheduler(self.settings)
        self.capacity = self.settings.num_blocks * block_size
        self.requests: dict[str, Request] = {}
        self.generated: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}

    def arrive(self) -> None:
        """Add one request, often with a prefix that others share."""
        rng = self.random
        prompt = [rng.randrange(3)] * rng.randint(0, 9) + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
        prompt = prompt[-(self.capacity - 1) :]
        request = Request(
            f"r{len(self.requests)}",
            prompt,
            rng.randint(1, min(16, self.capacity - len(prompt))),
            SamplingParams(0.0, rng.choice([None, 5])),
            frozenset(rng.sample(range(VOCAB_SIZE), 5)),
        )
        self.requests[request.request_id] = request
        self.generated[request.request_id] = []
        self.scheduler.add(request)

    def hear(self, events: list[Event]) -> None:
        """Note what events say; nothing may follow a request's last one."""
        for event in events:
            assert event.request_id not in self.finished
            self.generated[event.request_id] += event.token_ids
            if event.finish_reason:
                self.finished[event.request_id] = event.finish_reason

    def run(self, num_requests: int) -> None:
        """Let everything happen in random order until all requests have ended."""
        rng = self.random
        for _ in range(20_000):
            if len(self.finished) == num_requests and not self.scheduler.num_in_flight:
                break
            if len(self.requests) < num_requests and rng.random() < 0.3:
                self.arrive()
            if self.requests and rng.random() < 0.03:
                event = self.scheduler.finish(rng.choice(list(self.requests)), rng.choice([None, 1]))
                self.hear([event] if event else [])
            if step := self.scheduler.next_step():
                num_tokens = sum(len(entry.ids) or 1 for entry in step.entries)
                assert num_tokens <= self.settings.max_num_batched_tokens
                self.executor.submit(step)
            self.scheduler.check()
            if rng.random() < 0.5:
                self.executor.release(rng.randint(1, 3))
                for result in self.executor.wait(0):
                    self.hear(self.scheduler.complete(result))
        while step := self.scheduler.next_step():
            self.executor.submit(step)


@pytest.mark.parametrize("batch", range(10))
def test_random_worlds(batch: int) -> None:
    """No block lost, no request stuck, no row left, no id different from brute force."""
    num_preemptions = 0
    for number in range(50):
        world = World(batch * 50 + number)
        num_requests = world.random.randint(1, 14)
        world.run(num_requests)
        assert len(world.finished) == num_requests, f"world {batch * 50 + number}: stuck"
        for name, request in world.requests.items():
            expected, reason = brute_force(request)
            generated = world.generated[name]
            if world.finished[name] == reason and len(generated) == len(expected):
                assert generated == expected
            else:
                assert world.finished[name] in ("abort", "stop")
                assert generated == expected[: len(generated)]
        assert world.executor.open_rows == []
        assert world.scheduler.counts().used == 0
        num_preemptions += world.scheduler.num_preemptions
    assert num_preemptions > 0, "worlds too easy: nothing was ever preempted"
