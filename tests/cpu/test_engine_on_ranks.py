"""The real engine over real ranks: in every layout and setting the tokens are Transformers' own, whoever else runs."""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from transformers import AutoModelForCausalLM

from actors.decisions.failure.patience import StepClock
from actors.decisions.model.plan import Plan
from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.channel import EngineChannel
from actors.remote.engine import Engine
from actors.remote.meeting import Assignment, Meeting
from actors.words.messages import Bucket, Captured, Event, Request, SamplingParams, StepBatch, StepResult
from configs.config import Config
from tests.fakes.tiny_tokenizer import END_ID, with_tokenizer

ADDRESS = "127.0.0.1"
PATIENCE_S = 60.0
ANSWER_S = 60.0
MAX_MODEL_LEN = 112
BLOCK_SIZE = 4
NUM_NEW = 48
PROMPT_LENGTHS = (1, 3, 7, 12, 17, 24, 31, 40)
BLOCKS_OF_LONGEST = MAX_MODEL_LEN // BLOCK_SIZE
LARGE, SMALL = 20 * BLOCKS_OF_LONGEST, 3 * BLOCKS_OF_LONGEST  # blocks; SMALL: for 3 of the 8 sequences
NEAR_TIE = 1e-3
LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3)]
GREEDY = SamplingParams(temperature=0)

pytestmark = pytest.mark.timeout(180)


class Lent:
    """The channel as one engine has it: it goes on to the next engine when that one closes."""

    def __init__(self, channel: EngineChannel) -> None:
        self.channel = channel
        self.shapes = channel.shapes
        self.steps: list[StepBatch] = []

    def submit(self, step: StepBatch) -> None:
        self.steps.append(step)
        self.channel.submit(step)

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        return self.channel.wait(timeout_s)

    def capture(self, bucket: Bucket) -> None:
        self.channel.capture(bucket)

    def take_captured(self) -> list[Captured]:
        return self.channel.take_captured()

    def wake(self) -> None:
        self.channel.wake()

    def close(self) -> None: ...


class LocalGang:
    """The ranks of one layout in their loops, and engines over them, one after the other."""

    def __init__(self, pool: Any, plan: Plan, folder: Path, device: str = "cpu") -> None:
        """In the order in which a gang comes together. `device` as in a config."""
        self.pool, self.plan = pool, plan
        self.num_ranks = plan.topology.num_ranks
        asked = {"model": {"source": str(folder)}, "timeouts": {"collective_s": PATIENCE_S}, "device": device}
        config = Config.model_validate(asked)
        assignments = [Assignment(config, plan, shard.rank, ADDRESS, "cpu") for shard in plan.shards]
        keys = pool.ask([("hire", (assignment,)) for assignment in assignments])
        self._assemble(0, keys)

    def _assemble(self, epoch: int, keys: list[bytes]) -> None:
        self.channel = EngineChannel(ADDRESS, epoch, StepClock(PATIENCE_S))
        self.channel.admit(keys)
        [port] = self.pool.ask([("work", ("host_store",))])
        self.work("join", Meeting(epoch, ADDRESS, port, self.channel.address))
        self.channel.wait_for_ranks(PATIENCE_S)
        self.work("load")
        if epoch == 0:
            assert min(self.work("num_blocks_that_fit", self.num_ranks)) > LARGE
        self.channel.shapes = self.work("allocate", LARGE)[0]
        self.pool.tell([("work", ("serve",))] * self.num_ranks)

    def work(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = self.pool.ask([("work", (method, *args))] * self.num_ranks)
        return answers

    def begin_epoch(self, epoch: int) -> None:
        """The ranks leave the epoch, keep weights and cache, and meet again."""
        self.close()
        self.work("part", False)
        self._assemble(epoch, self.work("new_key"))

    def close(self) -> None:
        self.channel.close()
        self.pool.hear(self.num_ranks)

    def generate(
        self, requests: list[Request], at_once: bool = True, num_blocks: int = LARGE, **settings: Any
    ) -> tuple[list[list[int]], Any]:
        """A new engine, idle again when it ends → the ids of each request, and the engine."""
        limits = {"block_size": BLOCK_SIZE, "max_num_seqs": 40, "max_num_batched_tokens": 2048}
        limits |= {"num_lanes": self.plan.scheduler.num_lanes}
        executor, events = Lent(self.channel), Events()
        engine = Engine(executor, SchedulerSettings(**{**limits, **settings}), num_blocks, events.take)
        engine.start()
        for requested in [requests] if at_once else [[request] for request in requests]:
            for request in requested:
                engine.add(request)
            events.wait_for(requested)
        until = time.monotonic() + ANSWER_S
        while executor.steps[-1].entries:  # behind a stop id, steps that were made before it was known still run
            assert time.monotonic() < until, "the ranks were not told to forget"
            time.sleep(0.001)
        engine.close()
        self.steps = executor.steps
        return [events.ids[request.request_id] for request in requests], engine


class Events:
    """What an engine delivers."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, Event] = {}
        self.changed = threading.Condition()

    def take(self, events: list[Event]) -> None:
        with self.changed:
            for event in events:
                self.ids[event.request_id] += event.token_ids
                if event.finish_reason:
                    assert event.request_id not in self.ends
                    self.ends[event.request_id] = event
            self.changed.notify_all()

    def wait_for(self, requests: list[Request]) -> None:
        expected = {request.request_id for request in requests}
        with self.changed:
            assert self.changed.wait_for(lambda: expected <= set(self.ends), ANSWER_S), "requests did not end"
        errors = [event.error for event in self.ends.values() if event.finish_reason not in ("length", "stop")]
        assert not errors, errors


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(checkpoints("llama"), tmp_path_factory.mktemp("with_tokenizer"))


@pytest.fixture(scope="module")
def gang_of(pool: Any, plan_of: Callable[..., Plan], folder: Path) -> Iterator[Callable[[int, int], LocalGang]]:
    """The ranks of a layout; those of the layout before go home when another one is asked for."""
    now: dict[tuple[int, int], LocalGang] = {}

    def get(tp: int, pp: int) -> LocalGang:
        if (tp, pp) not in now:
            for gang in [now.pop(layout) for layout in list(now)]:
                gang.close()
            plan = plan_of("llama", tp, pp, model={"max_model_len": MAX_MODEL_LEN}, scheduler={"depth": 2})
            now[tp, pp] = LocalGang(pool, plan, folder)
        return now[tp, pp]

    yield get
    for gang in now.values():
        gang.close()


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoints("llama"), attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def references(model: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, what Transformers' generate says), none near a tie; some prompts begin as others do."""
    made: list[tuple[list[int], list[int]]] = []
    for length in PROMPT_LENGTHS:
        begin = made[-2][0][:8] if length in PROMPT_LENGTHS[4:] else []
        made.append(reference(model, begin, length))
    return made


@torch.inference_mode()
def reference(model: Any, begin: list[int], length: int) -> tuple[list[int], list[int]]:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        rest = torch.randint(model.config.vocab_size, (length - len(begin),), generator=generator)
        prompt = torch.cat([torch.tensor(begin, dtype=torch.int64), rest])[None]
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_NEW, do_sample=False)
        best = model(ids[:, :-1]).logits[0, length - 1 :].topk(2).values
        new_ids = ids[0, length:].tolist()
        if (best[:, 0] - best[:, 1]).min() > NEAR_TIE and len(set(new_ids)) > 8:
            return prompt[0].tolist(), new_ids
    raise AssertionError(f"no prompt of {length} ids is clear of ties")


def grid() -> Iterator[Any]:
    """Every setting in every layout; outside a soak, all for one rank, four for two or three, two for four, else one.

    Settings are the engine's: what goes wrong with one does so with one rank too, and what it sends meets shards and
    stages with two and three. More than four ranks show the layout itself.
    """
    few = [(16, True, SMALL, 2), (2048, False, SMALL, 2), (16, False, LARGE, 1), (2048, True, LARGE, 2)]
    usual = {2: few, 3: few, 4: few[:2], 6: few[:1], 8: few[2:3], 12: few[3:]}  # by number of ranks
    for (tp, pp), *setting in itertools.product(LAYOUTS, (16, 2048), (True, False), (LARGE, SMALL), (1, 2)):
        is_soak = tp * pp > 1 and tuple(setting) not in usual[tp * pp]
        yield pytest.param(tp, pp, *setting, marks=[pytest.mark.soak] if is_soak else [])


@pytest.mark.parametrize(("tp", "pp", "budget", "prefix_cache", "num_blocks", "depth"), list(grid()))
def test_greedy_is_transformers_generate(
    gang_of: Any, references: Any, tp: int, pp: int, budget: int, prefix_cache: bool, num_blocks: int, depth: int
) -> None:
    references = sorted(references, key=lambda one: -len(one[0]))  # nothing limits the first chunk but the budget
    requests = [Request(str(i), prompt, NUM_NEW, GREEDY) for i, (prompt, _) in enumerate(references)]
    gang = gang_of(tp, pp)
    ids, engine = gang.generate(
        requests,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        prefix_cache=prefix_cache,
        num_blocks=num_blocks,
        depth=depth,
    )
    assert ids == [new_ids for _, new_ids in references]
    assert (engine.stats.num_preemptions > 0) == (num_blocks == SMALL)
    entries = [entry for step in gang.steps for entry in step.entries]
    assert any(not entry.ids for entry in entries) == (depth > 1), "no step was made before its ids were known"
    assert (max(len(entry.ids) for entry in entries) > 16) == (budget > 16)
    assert (engine.stats.num_prompt_cached > 0) == prefix_cache or num_blocks == LARGE


def test_concurrent_streams_equal_the_same_requests_one_by_one(gang_of: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(103, (1 + number % 19,), generator=generator).tolist() for number in range(32)]
    requests = [Request(str(number), prompt, 16, GREEDY) for number, prompt in enumerate(prompts)]
    gang = gang_of(2, 2)
    alone, _ = gang.generate(requests, at_once=False, depth=1, prefix_cache=False)
    for depth in (1, 2):
        together, _ = gang.generate(requests, depth=depth)
        assert together == alone, depth
        assert max(len(step.entries) for step in gang.steps) >= 8


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["tru", "b"]},
        "n": {"type": "integer"},
        "f": {"type": "array", "items": {"enum": [0]}},
    },
    "required": ["a", "n", "f"],
    "additionalProperties": False,
}
GRAMMARS = [
    LLMatcher.grammar_from_json_schema(SCHEMA, {"whitespace_flexible": False}),
    LLMatcher.grammar_from_regex(r"(ab|true|[0-9]{2,4}){1,9}!"),
]

EVEN_PAIRS = [[first, second] for first in range(0, 103, 2) for second in range(0, 103, 2)]

# Every parameter alone and with others.
MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"top_k": 3},
    {"top_p": 0.6, "presence_penalty": 0.9},
    {"min_p": 0.2, "frequency_penalty": 1.1},
    {"top_k": 20, "top_p": 0.9, "logit_bias": {1: 3.0, 102: 2.0}},
    {"temperature": 0.0},
    {"min_tokens": 9, "repetition_penalty": 0.8, "top_p": 0.97},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1, "frequency_penalty": 0.7},
    {"grammar": GRAMMARS[0], "temperature": 0.0, "logprobs": 3},
    {"grammar": GRAMMARS[1], "top_p": 0.8, "presence_penalty": 0.9},
    {"grammar": GRAMMARS[0], "top_k": 4, "logit_bias": {END_ID: 4.0}},
    {"allowed_ids": list(range(3, 103, 7)), "top_p": 0.9, "presence_penalty": 0.5},
    {"bad_words": EVEN_PAIRS, "temperature": 1.5},
]


def mixed_requests() -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    requests = []
    for number in range(20):
        prompt = torch.randint(103, (2 + 2 * number,), generator=generator).tolist()
        params = SamplingParams(
            **{"temperature": 0.9 + 0.1 * (number % 3), "seed": number, **MIXED[number % len(MIXED)]}
        )
        # Ids that stop are banned below min_tokens; where neither it nor a grammar is set, none stops
        stops = frozenset(range(40, 60)) if params.min_tokens else frozenset([END_ID] if params.grammar else [])
        requests.append(Request(str(number), prompt, 9 if params.min_tokens else 24, params, stops))
    return requests


@pytest.fixture(scope="module")
def drawn_alone(gang_of: Any) -> list[list[int]]:
    """What each of the mixed requests draws while nobody else runs."""
    return gang_of(1, 1).generate(mixed_requests(), at_once=False, prefix_cache=False)[0]


@pytest.mark.parametrize(
    ("tp", "pp"),  # outside a soak each number of shards and of stages alone, and both together with four ranks
    [pytest.param(*layout, marks=[pytest.mark.soak] if layout[0] * layout[1] > 4 else []) for layout in LAYOUTS],
)
def test_seeded_draws_depend_on_the_request_alone(gang_of: Any, drawn_alone: list[list[int]], tp: int, pp: int) -> None:
    requests, gang = mixed_requests(), gang_of(tp, pp)
    ids, _ = gang.generate(requests)
    assert ids == drawn_alone
    ids, engine = gang.generate(requests[::-1], depth=2, num_blocks=2 * BLOCKS_OF_LONGEST, max_num_batched_tokens=41)
    assert ids[::-1] == drawn_alone
    assert engine.stats.num_preemptions > 0
    banned = [set(range(40, 60)) & set(drawn) for request, drawn in zip(requests, ids[::-1], strict=True)]
    assert not any(found for found, request in zip(banned, requests, strict=True) if request.sampling.min_tokens)
    for drawn, request in zip(drawn_alone, requests, strict=True):
        if request.sampling.allowed_ids:
            assert set(drawn) <= set(request.sampling.allowed_ids)
        if request.sampling.bad_words:
            known = [request.prompt_ids[-1], *drawn]
            assert not any(first % 2 == second % 2 == 0 for first, second in zip(known, drawn, strict=False))


@torch.inference_mode()
def constrained(model: Any, prompt: list[int], grammar: str, tokenizer: LLTokenizer) -> list[int] | None:
    """Greedy ids of a plain loop of Transformers and llguidance, with the end; None near a tie, or where none comes."""
    matcher, ids = LLMatcher(tokenizer, grammar, log_level=0), list(prompt)
    bits = allocate_token_bitmask(1, tokenizer.vocab_size)
    while len(ids) < len(prompt) + 30:
        logits = model(torch.tensor([ids])).logits[0, -1:]
        fill_next_token_bitmask(matcher, bits, 0)
        apply_token_bitmask_inplace(logits.numpy(), bits)
        best = logits[0].topk(2)
        if best.values[0] - best.values[1] < NEAR_TIE:
            return None
        ids.append(int(best.indices[0]))
        if ids[-1] == END_ID:
            return ids[len(prompt) :]
        assert matcher.consume_token(ids[-1]), matcher.get_error()
    return None


def test_greedy_with_a_grammar_is_a_plain_loop_of_transformers_and_llguidance(
    gang_of: Any, model: Any, folder: Path
) -> None:
    gang = gang_of(2, 2)
    text = (folder / "tokenizer.json").read_text()
    tokenizer = LLTokenizer(text, n_vocab=103, eos_token=END_ID)
    requests, expected = [], []
    for seed in range(6):
        prompt = torch.randint(103, (3 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        sampling = SamplingParams(0, grammar=GRAMMARS[seed % 2])
        if (ids := constrained(model, prompt, GRAMMARS[seed % 2], tokenizer)) is not None:
            requests.append(Request(str(seed), prompt, NUM_NEW, sampling, frozenset([END_ID])))
            expected.append(ids)
    assert len({request.sampling.grammar for request in requests}) == 2
    ids, _ = gang.generate(requests)
    assert ids == expected


def test_served_draws_follow_the_exact_probabilities(gang_of: Any, model: Any) -> None:
    num_draws, prompt = 4000, [5, 77, 31]
    cut = {"temperature": 3.0, "top_k": 12, "top_p": 0.95}
    requests = [
        Request(str(seed), prompt, 1, SamplingParams(**cut, seed=seed, logit_bias={9: 4.0}))
        for seed in range(num_draws)
    ]
    ids, _ = gang_of(2, 2).generate(requests, max_num_seqs=200)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    logits[9] += 4.0
    best = (logits / cut["temperature"]).topk(cut["top_k"])
    probabilities = best.values.softmax(0)
    num_left = int((probabilities.cumsum(0) - probabilities < cut["top_p"]).sum())
    assert 3 < num_left < cut["top_k"]
    expected = probabilities[:num_left] / probabilities[:num_left].sum() * num_draws
    counts = torch.bincount(torch.tensor(ids).flatten(), minlength=103)[best.indices[:num_left]]
    assert int(counts.sum()) == num_draws, "an id was drawn that is cut off"
    assert expected.min() > 5
    degrees = num_left - 1
    # Wilson and Hilferty's approximation of the 99.9 % quantile of chi-square
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert 0 < float(((counts - expected) ** 2 / expected).sum()) < limit
