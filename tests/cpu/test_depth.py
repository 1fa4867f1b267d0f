"""Several steps of a lane in flight over stages: what the last stage samples reaches the first when it is needed."""

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.tensors.feedback import FeedbackReceiver, FeedbackSender
from actors.tensors.sequence_table import Row
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch

CPU = torch.device("cpu")
PROMPTS = ([7, 50, 21, 9, 88], [3, 14, 15, 92, 65, 35, 8])
NUM_NEW = 12
BLOCKS_EACH = 20

pytestmark = pytest.mark.timeout(120)


class FakeLink:
    """Both ends of a link in one thread; remembers which sends were waited for."""

    def __init__(self) -> None:
        self.messages: deque[torch.Tensor] = deque()
        self.waited: list[list[int]] = []

    def send(self, tensor: torch.Tensor) -> Any:
        self.messages.append(tensor.clone())
        link = self

        class Sending:
            def wait(self) -> None:
                link.waited.append(tensor.tolist())

        return Sending()

    def receive(self, tensor: torch.Tensor) -> None:
        message = self.messages.popleft()
        assert message.shape == tensor.shape and message.dtype == tensor.dtype
        tensor.copy_(message)


def row() -> Row:
    return Row(0, SamplingParams(), array("q"), 0)


def step(number: int, lane: int, seen: int, *entries: list[int]) -> StepBatch:
    return StepBatch(0, number, lane, [], [], [Entry(0, 0, ids, [], True) for ids in entries], seen)


def test_the_first_stage_takes_no_more_than_a_step_needs() -> None:
    link, rows = FakeLink(), [row() for _ in range(5)]

    def take(rows: Sequence[Row], ids_R: torch.Tensor) -> None:
        for row, token_id in zip(rows, ids_R.tolist(), strict=True):
            row.ids.append(token_id)

    receiver = FeedbackReceiver(link, CPU, take)  # type: ignore[arg-type]
    for number, (lane, sampled) in enumerate([(0, (0,)), (1, (1, 2)), (0, ()), (0, (3,)), (1, (4,))]):
        receiver.expect(step(number, lane, -1), tuple(rows[i] for i in sampled))
    for ids in ([10], [11, 12], [13], [14]):
        link.send(torch.tensor(ids))
    known = lambda: [list(row.ids) for row in rows]  # noqa: E731
    receiver.catch_up(step(5, 0, -1, [1, 2]))
    assert known() == [[], [], [], [], []]
    receiver.catch_up(step(6, 1, 0, [1, 2]))
    assert known() == [[10], [], [], [], []]
    receiver.catch_up(step(7, 0, 0, [1], []))  # "your last token" in lane 0: up to step 3, but not step 4
    assert known() == [[10], [11], [12], [13], []]
    receiver.catch_up(step(8, 0, 4))
    assert known() == [[10], [11], [12], [13], [14]]
    receiver.catch_up(step(9, 0, 8, []))
    assert not link.messages


def test_the_last_stage_waits_only_for_what_the_first_has_taken() -> None:
    link = FakeLink()
    sender = FeedbackSender(link)
    for number in range(4):
        sender.send(step(number, 0, -1), torch.tensor([number] * (number % 3)))
    assert [message.tolist() for message in link.messages] == [[1], [2, 2]], "a step that samples nothing says nothing"
    sender.catch_up(step(4, 0, 0))
    assert link.waited == []
    sender.catch_up(step(5, 0, 1))
    assert link.waited == [[1]]
    sender.catch_up(step(6, 0, 5))
    assert link.waited == [[1], [2, 2]]


@pytest.fixture(scope="module")
def expected(checkpoints: Callable[[str], Path]) -> list[list[int]]:
    """What Transformers generates after each prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), attn_implementation="eager").eval()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        answers.append(model.generate(ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False)[0].tolist())
    return [answer[len(prompt) :] for answer, prompt in zip(answers, PROMPTS, strict=True)]


class Lanes:
    """Each prompt a lane of its own; the engine's view stays some steps behind."""

    def __init__(self, gang: Any) -> None:
        self.gang = gang
        self.num_steps = 0

    def run(self, entry: Entry, lane: int, seen: int, opened: bool = False) -> int:
        new = [NewSequence(entry.seq, SamplingParams(temperature=0), [], len(PROMPTS[entry.seq]))] if opened else []
        closed = [entry.seq] if opened and entry.new_blocks[0] >= 2 * BLOCKS_EACH else []
        sampled, _ = self.gang.execute(StepBatch(0, self.num_steps, lane, new, closed, [entry], seen))
        self.num_steps += 1
        [[token_id]] = sampled.token_ids
        return token_id

    def prefill(self, seq: int, ids: list[int], seen: int, first_block: int) -> int:
        blocks = list(range(first_block, first_block + BLOCKS_EACH))
        return self.run(Entry(seq, 0, ids, blocks, True), seq, seen, opened=True)


LAGS = (2, 4, 1000)
TOGETHER = {(2, 2): (4,), (2, 3): (2,)}  # outside a soak; with one shard all


@pytest.mark.parametrize(
    ("tp", "pp", "lag"),
    [
        pytest.param(*layout, lag, marks=[] if lag in TOGETHER.get(layout, LAGS) else [pytest.mark.soak])
        for layout in [(1, 2), (1, 3), (2, 2), (2, 3)]
        for lag in LAGS
    ],
)
def test_last_tokens_are_known_on_every_stage(
    gang_of: Any, expected: list[list[int]], tp: int, pp: int, lag: int
) -> None:
    lanes = Lanes(gang_of("llama", tp, pp, scheduler={"depth": 2, "num_lanes": 2}))
    answers = [[lanes.prefill(seq, prompt, -1, seq * BLOCKS_EACH)] for seq, prompt in enumerate(PROMPTS)]
    for done in range(NUM_NEW - 1):
        for seq, prompt in enumerate(PROMPTS):
            seen = lanes.num_steps - lag
            answers[seq].append(lanes.run(Entry(seq, len(prompt) + done, [], [], True), seq, seen))
    assert answers == expected


def test_a_sequence_computed_again_hears_nothing_of_its_first_life(gang_of: Any, expected: list[list[int]]) -> None:
    lanes = Lanes(gang_of("llama", 1, 3, scheduler={"depth": 2, "num_lanes": 2}))
    prompt, answer = PROMPTS[0], expected[0]
    lanes.prefill(0, prompt, -1, 0)
    lanes.run(Entry(0, len(prompt), [], [], True), 0, -1)
    again = lanes.prefill(0, prompt + answer[:2], 1, 2 * BLOCKS_EACH)
    assert again == answer[2]
    assert lanes.run(Entry(0, len(prompt) + 2, [], [], True), 0, 1) == answer[3]
    assert lanes.run(Entry(0, len(prompt) + 3, [answer[3]], [], True), 0, 3) == answer[4]


def test_a_new_epoch_expects_nothing_of_the_old_one(gang_of: Any, expected: list[list[int]]) -> None:
    gang = gang_of("llama", 2, 3, scheduler={"depth": 2, "num_lanes": 2})
    Lanes(gang).prefill(1, PROMPTS[1], -1, 0)
    gang.rejoin()
    lanes, prompt = Lanes(gang), PROMPTS[0]
    answer = [lanes.prefill(0, prompt, -1, 0)]
    answer += [lanes.run(Entry(0, len(prompt) + done, [], [], True), 0, -1) for done in range(NUM_NEW - 1)]
    assert answer == expected[0]
