"""The order of a batch job's rows and what it lets in, by simulation: the real scheduler over steps that take time."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from actors.decisions.schedule.kv_admission import KVAdmission
from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.settings import SchedulerSettings
from actors.decisions.schedule.stats import Stats
from actors.words.messages import Request, SamplingParams, StepBatch, StepResult
from deployments.api.bodies import ChatBody, CompletionBody
from deployments.api.responses import Stamp
from deployments.batch import window as window_module
from deployments.batch.order import Order, shape_of
from deployments.batch.rows import Row
from deployments.batch.window import Window

pytestmark = pytest.mark.timeout(60)

SLOTS = 16
BLOCK = 16


@dataclass
class Job:
    """Rows as prompts and answers' lengths, in the order of the input."""

    prompts: list[list[int]]
    answers: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, number: int) -> Row:
        body = CompletionBody(model="m", prompt=self.prompts[number], max_tokens=self.answers[number], seed=number)
        return Row(number, str(number), body, Stamp(str(number), 0), 100)


@dataclass
class Run:
    seconds: float
    cached: int
    preemptions: int
    busy: float  # mean sequences of a step


class Gang:
    """One engine over simulated steps: one reads all weights, and computes its tokens, whichever takes longer."""

    def __init__(self, job: Job, num_blocks: int) -> None:
        self.job, self.now = job, 0.0
        self.stats = Stats(lambda: self.now)
        self.scheduler = Scheduler(SchedulerSettings(BLOCK, SLOTS, 512, 1), num_blocks, self.stats)
        self.admission = KVAdmission(num_blocks, BLOCK, SLOTS)
        self.tickets: dict[str, int] = {}
        self.num_entries = 0

    def let_in(self, number: int) -> bool:
        request = Request(str(number), self.job.prompts[number], self.job.answers[number], SamplingParams(0.0))
        ticket = self.admission.admit([request])
        if ticket is not None:
            self.tickets[request.request_id] = ticket
            self.scheduler.add(request)
        return ticket is not None

    def step(self) -> None:
        step = self.scheduler.next_step()
        assert step is not None
        self.now += seconds_of(step)
        self.num_entries += len(step.entries)
        ids = [[7] for entry in step.entries if entry.sample]
        for event in self.scheduler.complete(StepResult(step.epoch, step.step, ids)) if step.entries else []:
            if event.finish_reason:
                self.admission.end(self.tickets.pop(event.request_id))
        if not self.tickets:
            self.scheduler.next_step()  # the ranks forget


def seconds_of(step: StepBatch) -> float:
    return max(1.0, sum(len(entry.ids) or 1 for entry in step.entries) / 64)


def run(job: Job, order: Sequence[int], num_blocks: int = 1000) -> Run:
    """All rows through one gang, in this order."""
    gang, left = Gang(job, num_blocks), list(reversed(order))
    while left or gang.tickets:
        while left and gang.let_in(left[-1]):
            left.pop()
        gang.step()
    gang.scheduler.check()
    assert gang.admission.num_blocks_promised == 0
    stats = gang.stats
    return Run(gang.now, stats.num_prompt_cached, stats.num_preemptions, gang.num_entries / stats.num_steps)


def ordered(job: Job) -> list[int]:
    """As one gang takes them."""
    window = Window(map(job.row, range(len(job))), SLOTS, 1000)
    taken: list[int] = []
    while window.fill():
        rows = window.take(0, 4)
        taken += [row.number for row in rows]
        for row in rows:
            window.answered(row.number, 100)
    assert sorted(taken) == list(range(len(job)))
    return taken


def ids(world: random.Random, count: int) -> list[int]:
    return world.choices(range(30_000), k=count)


def prefixes_in_turn(world: random.Random, num_prefixes: int = 16, rows: int = 320, length: int = 256) -> Job:
    shared = [ids(world, length) for _ in range(num_prefixes)]
    return Job([shared[row % num_prefixes] + ids(world, 16) for row in range(rows)], [16] * rows)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_one_prefix_find_it_in_a_cache_that_cannot_hold_all(seed: int) -> None:
    job = prefixes_in_turn(random.Random(seed))
    possible = (320 - 16) * 256
    plain, better = run(job, range(320), num_blocks=110), run(job, ordered(job), num_blocks=110)
    assert better.cached >= 0.95 * possible
    assert better.cached > 2 * plain.cached and better.seconds < 0.6 * plain.seconds


def test_conversations_of_one_system_prompt_are_a_group() -> None:
    def body(number: int) -> ChatBody:
        system = {"role": "system", "content": f"You are the {number % 2}th assistant. " * 20}
        return ChatBody.model_validate(
            {"model": "m", "messages": [system, {"role": "user", "content": str(number)}], "max_tokens": 8}
        )

    order = Order(SLOTS)
    order.add([shape_of(number, body(number), 1000) for number in range(20)])
    taken = order.take(0, 20)
    assert {number % 2 for number in taken[:10]} != {0, 1} != {number % 2 for number in taken[10:]}


@pytest.mark.parametrize("seed", range(3))
def test_prompts_and_answers_are_mixed(seed: int) -> None:
    """The input has first rows of much prompt, then rows of long answers: each alone wastes what the other needs."""
    world = random.Random(seed)
    prompts = [ids(world, 400) for _ in range(100)] + [ids(world, 16) for _ in range(100)]
    job = Job(prompts, [8] * 100 + [world.randint(90, 110) for _ in range(100)])
    plain, better = run(job, range(200)), run(job, ordered(job))
    assert better.seconds < 0.9 * plain.seconds


@pytest.mark.parametrize("seed", range(3))
def test_the_longest_answers_are_not_begun_last(seed: int) -> None:
    """Their prompts are long too, so that they are of the mixture that both ends leave for last."""
    world = random.Random(seed)
    answers = [world.randint(2, 4) for _ in range(150)] + [world.randint(20, 40) for _ in range(150)] + [300] * 3
    job = Job([ids(world, count) for count in [60] * 150 + [4] * 150 + [400] * 3], answers)
    plain, better = run(job, range(303)), run(job, ordered(job))
    assert better.seconds < 0.8 * plain.seconds


@pytest.mark.parametrize("seed", range(4))
def test_none_is_preempted_and_the_gang_stays_full(seed: int) -> None:
    """Far more rows than fit: admission by number alone would let in 18 of them."""
    world = random.Random(seed)
    job = Job([ids(world, world.randint(1, 120)) for _ in range(150)], [world.randint(1, 100) for _ in range(150)])
    num_blocks = 60
    done = run(job, ordered(job), num_blocks)
    assert done.preemptions == 0
    assert done.busy > 4  # of the 5 or so that 60 blocks hold, at 8 to 14 blocks each


def test_blocks_of_a_shared_prefix_are_counted_once() -> None:
    admission = KVAdmission(num_blocks=100, block_size=BLOCK, max_num_seqs=50)
    shared = list(range(64 * BLOCK))
    tickets = []
    for number in range(40):
        ticket = admission.admit([Request(str(number), [*shared, number], 15, SamplingParams(0.0))])
        if ticket is None:
            break
        tickets.append(ticket)
    assert len(tickets) == 36 and admission.num_blocks_promised == 100
    for ticket in tickets:
        admission.end(ticket)
    assert admission.num_blocks_promised == 0


def test_a_request_that_needs_all_is_let_in_alone() -> None:
    admission = KVAdmission(num_blocks=10, block_size=BLOCK, max_num_seqs=8)
    first = admission.admit([Request("a", [1] * 10, 10, SamplingParams(0.0))])
    whole = [Request("b", [1] * 80, 80, SamplingParams(0.0))]
    assert first is not None and admission.admit(whole) is None
    admission.end(first)
    assert admission.admit(whole) is not None


def test_shorter_answers_than_asked_for_are_expected_once_many_have_ended() -> None:
    admission = KVAdmission(num_blocks=1000, block_size=BLOCK, max_num_seqs=8)
    assert admission.forecast.share == 1.0
    for _ in range(30):
        admission.forecast.observe(50, 500)
    assert admission.forecast.share == pytest.approx(0.1)
    admission.admit([Request("a", [1] * 16, 160, SamplingParams(0.0))])
    assert admission.num_blocks_promised == 2


# --- several gangs, and the window ------------------------------------------------------------------------------------


def test_gangs_share_the_rows_and_not_the_prefixes() -> None:
    job = prefixes_in_turn(random.Random(0), num_prefixes=6)
    window = Window(map(job.row, range(320)), 2 * SLOTS, 1000)
    seen: list[set[int]] = [set(), set()]
    taken: list[int] = []
    while window.fill():
        for gang in (0, 1):
            rows = window.take(gang, 8)
            taken += [row.number for row in rows]
            seen[gang] |= {row.number % 6 for row in rows if len(taken) < 200}  # at the end each takes what is left
            for row in rows:
                window.answered(row.number, 100)
    assert sorted(taken) == list(range(320))
    assert not seen[0] & seen[1] and seen[0] and seen[1]


def test_rows_of_a_lost_gang_come_back_and_none_twice() -> None:
    job = prefixes_in_turn(random.Random(1))
    window = Window(map(job.row, range(320)), SLOTS, 1000)
    world, answered = random.Random(2), []
    held: dict[int, Row] = {}
    while window.fill():
        held |= {row.number: row for row in window.take(0, 10)}
        if world.random() < 0.3:
            window.give_back(0, held.values())
            held = {}
        for number in world.sample(sorted(held), len(held) // 2 or len(held)):
            window.answered(number, 100)
            answered.append(number)
            del held[number]
    assert sorted(answered) == list(range(320))


def test_rows_are_read_only_as_they_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "WINDOW_ROWS", 40)
    job, read = prefixes_in_turn(random.Random(3)), []

    def rows() -> Iterator[Row]:
        for number in range(320):
            read.append(number)
            yield job.row(number)

    window, unanswered = Window(rows(), SLOTS, 1000), list[Row]()
    while window.fill():
        unanswered += window.take(0, 3)
        oldest = min(row.number for row in unanswered)
        assert read[-1] <= oldest + 40 + 1  # one row is looked at before there is room for it
        newest = max(unanswered, key=lambda row: row.number)  # the oldest is answered last, whenever there is another
        unanswered.remove(newest)
        window.answered(newest.number, 100)
    assert read == list(range(320))


def test_a_window_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "WINDOW_BYTES", 1000)
    job = prefixes_in_turn(random.Random(4))
    window = Window(map(job.row, range(320)), SLOTS, 1000)
    window.fill()
    assert window.num_waiting == 10


@pytest.mark.parametrize("seed", range(3))
def test_answers_that_wait_for_an_older_row_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Then a gang gets the oldest row and no other: it ends, with gangs that are lost too."""
    monkeypatch.setattr(window_module, "ANSWER_BYTES", 1000)
    job, world = prefixes_in_turn(random.Random(seed)), random.Random(seed)
    window, held, waiting = Window(map(job.row, range(320)), SLOTS, 1000), dict[int, Row](), set[int]()
    left, num_held = set(range(320)), 0
    while window.fill():
        is_full = len(waiting) * 100 >= 1000
        assert window.num_waiting <= 1 or not is_full
        rows = window.take(0, 4)
        assert not is_full or [row.number for row in rows] in ([], [min(left)])
        held |= {row.number: row for row in rows}
        if world.random() < 0.1:
            window.give_back(0, held.values())
            held = {}
            continue
        num_held = max(num_held, len(held))
        number = max(held)  # the oldest is answered last
        window.answered(number, 100)
        del held[number]
        left.remove(number)
        waiting = {one for one in {*waiting, number} if left and one > min(left)}
        assert len(waiting) <= 10 + num_held
    assert not left
