"""Log-probabilities of prompt and answer are Transformers' own, in every layout, however the prompt is cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.decisions.schedule.scheduler import Scheduler
from actors.decisions.schedule.settings import SchedulerSettings
from actors.words.messages import Request, SamplingParams, StepResult, TokenLogprobs

TOLERANCE = 1e-4
NUM_NEW = 6
NUM_BLOCKS = 96

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def log_softmax_of(checkpoints: Callable[[str], Path]) -> Callable[[list[int]], torch.Tensor]:
    """Transformers' log-probabilities [ids, vocabulary] after each id."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), attn_implementation="eager")

    @torch.inference_mode()
    def of(ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)

    return of


class Told:
    """What was said of one request."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []


def run(
    gang: Any, requests: list[Request], num_blocks: int = NUM_BLOCKS, **settings: Any
) -> tuple[dict[str, Told], list[int], Scheduler]:
    """Requests through a scheduler, step after step → what was told, rows of logits of each step, the scheduler."""
    limits = {"block_size": gang.plan.block_size, "max_num_seqs": 32, "num_lanes": 1}
    scheduler = Scheduler(SchedulerSettings(**{**limits, "max_num_batched_tokens": 2048, **settings}), num_blocks)
    told = {request.request_id: Told() for request in requests}
    for request in requests:
        scheduler.add(request)
    num_rows = []
    while step := scheduler.next_step():
        sampled, logits = gang.execute(step)
        if logits is None:
            continue
        num_rows.append(logits.shape[0])
        for event in scheduler.complete(StepResult(step.epoch, step.step, **vars(sampled))):
            of_request = told[event.request_id]
            assert event.finish_reason != "error", event.error
            of_request.ids += event.token_ids
            of_request.logprobs += event.logprobs
            of_request.prompt_logprobs += event.prompt_logprobs
    assert not scheduler.num_live
    return told, num_rows, scheduler


def requests_of(lengths: list[int], **sampling: Any) -> list[Request]:
    generator = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(103, (length,), generator=generator).tolist() for length in lengths]
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    return [Request(str(i), prompt, NUM_NEW, params) for i, prompt in enumerate(prompts)]


def distance(told: TokenLogprobs, token_id: int, expected: torch.Tensor, num_top: int) -> float:
    """Largest distance from Transformers' log-probabilities [vocabulary] after the ids before."""
    best = expected.topk(num_top).values
    assert len(told.top_ids) == len(set(told.top_ids)) == len(told.top_logprobs) == num_top
    assert told.top_logprobs == sorted(told.top_logprobs, reverse=True)
    pairs = [(told.logprob, expected[token_id])]
    pairs += [(logprob, expected[top_id]) for top_id, logprob in zip(told.top_ids, told.top_logprobs, strict=True)]
    pairs += list(zip(told.top_logprobs, best, strict=True))
    return max(abs(said - float(true)) for said, true in pairs)


def check(request: Request, told: Told, log_softmax: torch.Tensor) -> None:
    ids, first = request.prompt_ids + told.ids, len(request.prompt_ids)
    params = request.sampling
    assert len(told.ids) == request.max_tokens
    if params.logprobs is not None:
        assert len(told.logprobs) == len(told.ids)
    else:
        assert not told.logprobs
    for at, of_id in enumerate(told.logprobs, first):
        assert distance(of_id, ids[at], log_softmax[at - 1], params.logprobs or 0) < TOLERANCE
    assert len(told.prompt_logprobs) == (0 if params.prompt_logprobs is None else first - 1)
    for at, of_id in enumerate(told.prompt_logprobs, 1):
        assert distance(of_id, ids[at], log_softmax[at - 1], params.prompt_logprobs or 0) < TOLERANCE


@pytest.mark.parametrize(
    ("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), pytest.param(4, 3, marks=pytest.mark.soak)]
)
def test_logprobs_are_transformers_log_softmax(gang_of: Any, log_softmax_of: Any, tp: int, pp: int) -> None:
    gang = gang_of("llama", tp, pp)
    requests = [
        *requests_of([1, 5, 23], logprobs=4, prompt_logprobs=20),
        *requests_of([2, 30], logprobs=20, temperature=1.5, top_k=9, presence_penalty=1.0, logit_bias={4: 3.0}, seed=1),
        *requests_of([17], logprobs=0, prompt_logprobs=0),
        *requests_of([9, 14]),
    ]
    requests = [Request(str(i), r.prompt_ids, r.max_tokens, r.sampling) for i, r in enumerate(requests)]
    for budget in (2048, 8, 11):
        told, _, _ = run(gang, requests, max_num_batched_tokens=budget)
        for request in requests:
            said = told[request.request_id]
            check(request, said, log_softmax_of(request.prompt_ids + said.ids))


def test_a_prompt_alone_can_be_asked_about(gang_of: Any, log_softmax_of: Any) -> None:
    [request] = requests_of([13], prompt_logprobs=2)
    request = Request("only", request.prompt_ids, 0, request.sampling)
    told, num_rows, _ = run(gang_of("llama", 2, 1), [request])
    check(request, told["only"], log_softmax_of(request.prompt_ids))
    assert num_rows == [12]


def test_logprobs_after_a_preemption_are_told_once(gang_of: Any, log_softmax_of: Any) -> None:
    requests = requests_of([30, 25, 28, 21], logprobs=1, prompt_logprobs=3)
    requests = [Request(r.request_id, r.prompt_ids, 24, r.sampling) for r in requests]
    told, _, scheduler = run(gang_of("llama", 2, 1), requests, num_blocks=28, max_num_batched_tokens=9)
    assert scheduler.stats.num_preemptions > 0
    for request in requests:
        said = told[request.request_id]
        check(request, said, log_softmax_of(request.prompt_ids + said.ids))


def test_logits_are_computed_only_of_rows_that_are_asked_for(gang_of: Any) -> None:
    gang = gang_of("llama")
    _, num_rows, _ = run(gang, requests_of([30, 40], logprobs=3))
    assert max(num_rows) == 2
    _, num_rows, _ = run(gang, requests_of([60] * 6, prompt_logprobs=1))
    assert sum(num_rows) == 6 * (59 + NUM_NEW)
    assert 200 < max(num_rows) <= 256 + 6, "the logits of a step are [256 prompt ids + batch, vocabulary] at most"
