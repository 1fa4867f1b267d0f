"""Every layout gives Transformers' own logits and tokens: TP × PP over families, chunks, reused prefixes and epochs."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch

GREEDY = SamplingParams(temperature=0)
NUM_NEW = 32
PROMPT_LENGTHS = (1, 3, 7, 12, 17, 29)
TOLERANCE = 1e-4
FAMILIES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")
SHARDS, STAGES = (1, 2, 4), (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What Transformers itself says of a prompt."""

    prompt: list[int]
    new_ids: list[int]
    logits: torch.Tensor  # [len(prompt) + len(new_ids) - 1, vocabulary]: after each id


@pytest.fixture(scope="module")
def references(checkpoints: Callable[[str], Path]) -> Callable[[str], list[Reference]]:
    made: dict[str, list[Reference]] = {}

    def of(family: str) -> list[Reference]:
        if family not in made:
            model: Any = AutoModelForCausalLM.from_pretrained(checkpoints(family), attn_implementation="eager")
            made[family] = [reference(model.eval(), length) for length in PROMPT_LENGTHS]
        return made[family]

    return of


@torch.inference_mode()
def reference(model: Any, length: int) -> Reference:
    """Of the first random prompt that is neither a near tie anywhere (rounding would decide) nor monotonous."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(model.config.vocab_size, (1, length), generator=generator)
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_NEW, do_sample=False)
        new_ids = ids[0, length:].tolist()
        logits = model(ids[:, :-1]).logits[0]
        best = logits[length - 1 :].topk(2, dim=-1)
        assert best.indices[:, 0].tolist() == new_ids
        margin = (best.values[:, 0] - best.values[:, 1]).min()
        if margin > 10 * TOLERANCE and len(set(new_ids)) > 8:
            return Reference(prompt[0].tolist(), new_ids, logits)
    raise AssertionError(f"no prompt of {length} ids shows anything; scale the weights otherwise")


class Driver:
    """A scheduler reduced to what a test needs: blocks in random order, steps one after the other."""

    def __init__(self, gang: Any, seed: int = 0) -> None:
        self.gang = gang
        self.block_size = gang.plan.block_size
        self.random = random.Random(seed)
        self.free = list(range(96))
        self.random.shuffle(self.free)
        self.blocks: dict[int, list[int]] = {}
        self.num_steps = 0
        self.opened: list[NewSequence] = []
        self.closed: list[int] = []

    def open(self, seq: int, shared_blocks: list[int] | None = None, known_ids: list[int] | None = None) -> None:
        self.opened.append(NewSequence(seq, GREEDY, known_ids or []))
        self.blocks[seq] = []
        self.shared = shared_blocks or []

    def close(self, seq: int) -> None:
        self.closed.append(seq)
        self.free += self.blocks.pop(seq)

    def entry(self, seq: int, start: int, ids: list[int], sample: bool, shared: list[int] | None = None) -> Entry:
        held = self.blocks[seq]
        new = [] if held else list(shared or [])
        while (len(held) + len(new)) * self.block_size < start + max(1, len(ids)):
            new.append(self.free.pop())
        held += new
        return Entry(seq, start, ids, new, sample)

    def step(self, entries: list[Entry]) -> tuple[list[list[int]], Any]:
        self.random.shuffle(entries)
        lane = self.num_steps % self.gang.plan.scheduler.num_lanes
        step = StepBatch(self.gang.pool.epoch, self.num_steps, lane, self.opened, self.closed, entries)
        self.opened, self.closed = [], []
        self.num_steps += 1
        sampled, logits = self.gang.execute(step)
        return sampled.token_ids, logits


def check_logits(entries: list[Entry], logits: torch.Tensor, references: list[Reference]) -> float:
    """The largest distance of the sampling entries' logits."""
    sampling = [entry for entry in entries if entry.sample]
    expected = [references[entry.seq].logits[entry.start + max(1, len(entry.ids)) - 1] for entry in sampling]
    return float((logits - torch.stack(expected)).abs().max())


def generate(driver: Driver, references: list[Reference], limit: Callable[[], int] | None = None) -> float:
    """Prefill all (chunks of at most `limit()` ids), then decode; asserts the tokens, returns the logits' distance."""
    done = [0] * len(references)  # ids in the cache
    known = [list(reference.prompt) for reference in references]
    total = [len(reference.prompt) + NUM_NEW for reference in references]
    for seq in range(len(references)):
        driver.open(seq)
    distance = 0.0
    while any(len(known[seq]) < total[seq] for seq in range(len(references))):
        entries = []
        for seq, ids in enumerate(known):
            count = min(limit() if limit else len(ids), len(ids) - done[seq])
            if len(ids) < total[seq] and count:
                end = done[seq] + count
                entries.append(driver.entry(seq, done[seq], ids[done[seq] : end], sample=end == len(ids)))
                done[seq] = end
        if not entries:
            continue
        ids_of_step, logits = driver.step(entries)
        sampling = [entry for entry in entries if entry.sample]
        if sampling:
            distance = max(distance, check_logits(entries, logits, references))
        for entry, ids in zip(sampling, ids_of_step, strict=True):
            known[entry.seq] += ids
    for reference, ids in zip(references, known, strict=True):
        assert ids[len(reference.prompt) :] == reference.new_ids
    return distance


def layouts() -> Iterator[Any]:
    """Every family in every layout; outside a soak one of them in all, the others in three layouts each.

    What a family has of its own meets shards (few KV heads, biases, norms, a tied head) or stages (windows that differ
    by layer, a tied head): each number of either is there for each family. Both together are there for each layout.
    """
    for family, (t, tp), (p, pp) in itertools.product(FAMILIES, enumerate(SHARDS), enumerate(STAGES)):
        is_usual = family == FAMILIES[0] or (t + FAMILIES.index(family)) % 3 == p
        yield pytest.param(family, tp, pp, marks=[] if is_usual else [pytest.mark.soak])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("family", "tp", "pp"), list(layouts()))
def test_layout_gives_transformers_logits_and_tokens(
    gang_of: Any, references: Callable[[str], list[Reference]], family: str, tp: int, pp: int
) -> None:
    gang = gang_of(family, tp, pp)
    assert gang.loaded_bytes == [shard.weight_bytes for shard in gang.plan.shards]
    assert generate(Driver(gang), references(family)) < TOLERANCE


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("family", "tp", "pp"), [("llama", 1, 1), ("mistral", 2, 1), ("qwen2", 1, 3), ("qwen3", 4, 2)])
def test_chunks_of_any_size_mixed_with_decode_change_nothing(
    gang_of: Any, references: Callable[[str], list[Reference]], family: str, tp: int, pp: int
) -> None:
    driver = Driver(gang_of(family, tp, pp, scheduler={"num_lanes": 2}), seed=tp * 10 + pp)
    assert generate(driver, references(family), lambda: driver.random.choice((0, 1, 1, 2, 3, 5, 9))) < TOLERANCE


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_reused_prefix_gives_the_same_logits(
    gang_of: Any, references: Callable[[str], list[Reference]], family: str
) -> None:
    reference = max(references(family), key=lambda r: len(r.prompt))
    driver = Driver(gang_of(family, 2, 2))
    driver.open(7)
    driver.step([driver.entry(7, 0, reference.prompt, sample=False)])
    num_shared = len(reference.prompt) // driver.block_size
    shared, known = driver.blocks[7][:num_shared], reference.prompt[: num_shared * driver.block_size]
    driver.opened.append(NewSequence(0, GREEDY, known))
    driver.blocks[0] = []
    rest = driver.entry(0, len(known), reference.prompt[len(known) :], sample=True, shared=shared)
    ids, logits = driver.step([rest])
    assert ids == [reference.new_ids[:1]]
    assert check_logits([rest], logits, [reference]) < TOLERANCE


@pytest.mark.timeout(120)
def test_blocks_are_reused_after_a_close_and_a_sequence_may_be_opened_again(
    gang_of: Any, references: Callable[[str], list[Reference]]
) -> None:
    driver = Driver(gang_of("llama", 2, 1))
    for _ in range(3):
        assert generate(driver, references("llama")) < TOLERANCE
        for seq in range(len(PROMPT_LENGTHS)):
            driver.close(seq)
    ids, _ = driver.step([])  # a step that only drops rows
    assert ids == []
    assert sorted(driver.free) == list(range(96))


@pytest.mark.timeout(120)
def test_empty_ids_mean_the_last_token(gang_of: Any, references: Callable[[str], list[Reference]]) -> None:
    driver = Driver(gang_of("qwen3", 2, 1))
    reference = references("qwen3")[3]
    driver.open(0)
    ids, _ = driver.step([driver.entry(0, 0, reference.prompt, sample=True)])
    answer = ids[0]
    for position in range(len(reference.prompt), len(reference.prompt) + NUM_NEW - 1):
        ids, _ = driver.step([driver.entry(0, position, [], sample=True)])
        answer += ids[0]
    assert answer == reference.new_ids


@pytest.mark.timeout(120)
def test_ranks_keep_their_weights_through_a_new_epoch(
    gang_of: Any, references: Callable[[str], list[Reference]]
) -> None:
    gang = gang_of("qwen2", 2, 2)
    driver = Driver(gang)
    driver.open(0)
    driver.step([driver.entry(0, 0, references("qwen2")[4].prompt, sample=True)])
    gang.rejoin()
    assert generate(Driver(gang, seed=1), references("qwen2")) < TOLERANCE
