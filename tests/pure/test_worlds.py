"""Random worlds: arrivals, lengths, aborts, tiny caches, lanes, depths, lost gangs, against a reference."""

import random

import pytest

from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.settings import SchedulerSettings
from actors.words.messages import Event, Request, SamplingParams, StepBatch, TokenLogprobs
from tests.fakes.fake_executor import FakeExecutor, logprobs_of, next_id

VOCAB_SIZE = 97


def brute_force(request: Request) -> tuple[list[int], str]:
    """All ids that a request yields, alone, without paging, and why it ends."""
    ids, generated, sampling = list(request.prompt_ids), [], request.sampling
    while len(generated) < request.max_tokens:
        banned = sampling.stop_ids if len(generated) < sampling.min_tokens else []
        generated.append(next_id(ids + generated, VOCAB_SIZE, sampling.seed or 0, banned))
        if generated[-1] in request.stop_token_ids and len(generated) > sampling.min_tokens:
            return generated, "stop"
    return generated, "length"


def all_logprobs(ids: list[int], first: int, num_top: int | None) -> list[TokenLogprobs]:
    """Of the ids from position `first` on, where asked."""
    if num_top is None:
        return []
    return [logprobs_of(ids[:at], ids[at], num_top, VOCAB_SIZE) for at in range(first, len(ids))]


class World:
    """One random world, run to its end. `loss`: how likely it is, at each turn, that the gang is lost."""

    def __init__(self, seed: int, loss: float = 0.0) -> None:
        self.random = rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 16])
        max_num_seqs = rng.randint(1, 8)
        self.num_blocks = max(1, rng.randint(12, 60) // block_size)
        self.settings = SchedulerSettings(
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 100]),
            num_lanes=rng.randint(1, 4),
            depth=rng.randint(1, 3),
            prefix_cache=rng.random() < 0.5,
        )
        self.loss = loss
        self.executor = FakeExecutor(VOCAB_SIZE, block_size, is_manual=True)
        self.scheduler = Scheduler(self.settings, self.num_blocks)
        self.capacity = self.num_blocks * block_size
        self.requests: dict[str, Request] = {}
        self.generated: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.finished: dict[str, str] = {}

    def arrive(self) -> None:
        """Add one request, often with a prefix that others share."""
        rng = self.random
        prompt = [rng.randrange(3)] * rng.randint(0, 9) + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
        prompt = prompt[-(self.capacity - 1) :]
        max_tokens = rng.choice([0, *[rng.randint(1, min(16, self.capacity - len(prompt)))] * 7])
        stop_ids = rng.sample(range(VOCAB_SIZE), 5)
        sampling = SamplingParams(
            0.0,
            rng.choice([None, 5]),
            min_tokens=rng.choice([0, 0, max_tokens // 2]),
            stop_ids=sorted(stop_ids),
            logprobs=rng.choice([None, None, 0, 3]),
            prompt_logprobs=rng.choice([None, None, 0, 2]),
        )
        key = rng.choice(["", "", "a", "b"])
        request = Request(f"r{len(self.requests)}", prompt, max_tokens, sampling, frozenset(stop_ids), key=key)
        self.requests[request.request_id] = request
        for heard in (self.generated, self.logprobs, self.prompt_logprobs):
            heard[request.request_id] = []
        self.scheduler.add(request)

    def hear(self, events: list[Event]) -> None:
        """Note what events say; nothing may follow a request's last one."""
        for event in events:
            assert event.request_id not in self.finished
            self.generated[event.request_id] += event.token_ids
            self.logprobs[event.request_id] += event.logprobs
            self.prompt_logprobs[event.request_id] += event.prompt_logprobs
            if event.token_ids:
                self.check_prompt_logprobs(event.request_id)
            if event.finish_reason:
                self.finished[event.request_id] = event.finish_reason

    def check_prompt_logprobs(self, name: str) -> None:
        """All of them are told, before or with the first id, and once."""
        request = self.requests[name]
        expected = all_logprobs(request.prompt_ids, 1, request.sampling.prompt_logprobs)
        assert self.prompt_logprobs[name] == expected

    def check_answer(self, name: str) -> None:
        """What was heard of a request is what brute force says, up to where it was ended from outside."""
        request, generated = self.requests[name], self.generated[name]
        expected, reason = brute_force(request)
        if self.finished[name] == reason and len(generated) == len(expected):
            self.check_prompt_logprobs(name)
        else:
            assert self.finished[name] in ("abort", "stop")
        assert generated == expected[: len(generated)]
        ids = request.prompt_ids + generated
        assert self.logprobs[name] == all_logprobs(ids, len(request.prompt_ids), request.sampling.logprobs)

    def check_solitude(self, step: StepBatch) -> None:
        """A suspect runs alone."""
        sequences = {sequence.seq: sequence for sequence in self.scheduler._live.values()}
        running = [sequences[entry.seq] for entry in step.entries]
        if any(sequence.is_suspect for sequence in running):
            in_flight = {sequence for flight in self.scheduler._flights for sequence, _ in flight.entries}
            assert in_flight == set(running)
            assert len(running) == 1

    def lose_the_gang(self) -> None:
        """With all that its ranks knew; some of what ran counts as suspect."""
        in_flight = {flight.step for flight in self.scheduler._flights}
        lost = self.scheduler.begin_epoch()
        assert in_flight <= set(lost)
        assert not (self.scheduler.num_in_flight or self.scheduler.num_running)
        assert self.scheduler.counts().free == self.num_blocks
        self.executor = FakeExecutor(VOCAB_SIZE, self.settings.block_size, is_manual=True)
        places = {name: place for step in lost.values() for name, place in step.items()}
        self.scheduler.suspect({name: place for name, place in places.items() if self.random.random() < 0.5})

    def run(self, num_requests: int) -> None:
        """Let everything happen in random order until all requests have ended."""
        rng = self.random
        for _ in range(20_000):
            if len(self.finished) == num_requests and not self.scheduler.num_in_flight:
                break
            if len(self.requests) < num_requests and rng.random() < 0.3:
                self.arrive()
            if self.requests and rng.random() < 0.03:
                event = self.scheduler.finish(rng.choice(list(self.requests)), rng.choice(["abort", "stop"]))
                self.hear([event] if event else [])
            if self.random.random() < self.loss:
                self.lose_the_gang()
            if step := self.scheduler.next_step():
                self.check_solitude(step)
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


BATCHES = [*range(10), *(pytest.param(batch, marks=pytest.mark.soak) for batch in range(10, 200))]


@pytest.mark.parametrize("batch", BATCHES)
def test_random_worlds(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block lost, no request stuck, no row left, no id and no logprob different from brute force."""
    monkeypatch.setattr("actors.decisions.schedule.scheduler.PROMPT_LOGPROBS_CHUNK", 7)
    num_preemptions = num_replayed = 0
    for number in range(50):
        world = World(batch * 50 + number, loss=number % 2 * 0.03)
        num_requests = world.random.randint(1, 14)
        world.run(num_requests)
        num_replayed += world.scheduler.stats.num_replayed
        assert len(world.finished) == num_requests, f"world {batch * 50 + number}: stuck"
        for name in world.requests:
            world.check_answer(name)
        assert world.executor.open_rows == []
        assert world.scheduler.counts().used == 0
        num_preemptions += world.scheduler.stats.num_preemptions
    assert num_preemptions > 0, "worlds too easy: nothing was ever preempted"
    assert num_replayed > 0, "no gang was lost under a request"
