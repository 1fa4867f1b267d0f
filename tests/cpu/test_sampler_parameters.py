"""Sampling parameters: what they leave and how they weigh is Transformers' own, on any number of shards, tie or not."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from actors.decisions.model.shard_plan import split_evenly
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.sampled_ids import UNKNOWN_ID, SampledIds
from actors.tensors.sampling.bad_words import BAD_WORD
from actors.tensors.sampling.logits_processors import LogitsProcessors, SamplingRow
from actors.tensors.sampling.ranking import NO_TOKEN, best_of_shard, ids_of, scores_of, sort_keys_of
from actors.tensors.sampling.sampler import Sampler, SamplingBatch
from actors.tensors.sampling.truncation import NUM_CANDIDATES, Truncation, truncation_thresholds
from actors.words.messages import SamplingParams
from cluster.collectives.interface import LoneShard

BACKEND = CPUBackend(torch.device("cpu"))
NUM_DRAWS = 20_000

pytestmark = pytest.mark.timeout(90)


class ThreadGroup:
    """Shards as threads of one process; counts what is gathered."""

    def __init__(self, size: int, shard: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.size, self.shard, self.slots, self.barrier = size, shard, slots, barrier
        self.num_gathered = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the sampler sums nothing")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_gathered += tensor.numel()
        self.slots[self.shard] = tensor
        self.barrier.wait(10)
        gathered = torch.stack(self.slots)
        self.barrier.wait(10)
        return gathered

    def abort(self) -> None: ...

    def close(self) -> None: ...


def on_shards(num_shards: int, logits: torch.Tensor, job: Callable[[Any, torch.Tensor, tuple[int, int]], Any]) -> list:
    """What job(group, this shard's logits, its vocabulary rows) gives on every shard."""
    slots, barrier, results = [None] * num_shards, threading.Barrier(num_shards), [None] * num_shards

    def run(shard: int) -> None:
        first, end = split_evenly(logits.shape[1], shard, num_shards)
        group = ThreadGroup(num_shards, shard, slots, barrier)
        results[shard] = job(group, logits[:, first:end], (first, end))

    threads = [threading.Thread(target=run, args=(shard,)) for shard in range(num_shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def allowed(num_shards: int, logits: torch.Tensor, sampling: Sequence[SamplingParams]) -> torch.Tensor:
    """Bool [R, V]: what truncation keeps of logits already divided by the temperature; the same on every shard."""
    truncation = Truncation.of([SamplingRow(params, 0) for params in sampling], BACKEND.upload)
    assert truncation is not None and len(truncation.rows_K) == len(sampling)

    def job(group: Any, mine: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        given = mine, truncation, group, rows, logits.shape[1]
        found = [truncation_thresholds(*given, ahead, None) for ahead in (False, True)]
        assert torch.equal(*found), "what is read on the host changes nothing"
        return found[0]

    thresholds = on_shards(num_shards, logits, job)
    assert all(torch.equal(other, thresholds[0]) for other in thresholds)
    return sort_keys_of(logits, torch.arange(logits.shape[1])) >= thresholds[0]


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Transformers' processors in the order of its generate(), in float64; logits [R, V]."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits.double())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores


def sample_on(num_shards: int, logits: torch.Tensor, rows: list[SamplingRow]) -> list[list[int]]:
    def job(group: Any, mine: torch.Tensor, vocab_rows: tuple[int, int]) -> list[int]:
        return (
            Sampler(group, vocab_rows, logits.shape[1], BACKEND.best_tokens)
            .sample(mine, SamplingBatch.of(rows, BACKEND.upload))
            .tolist()
        )

    return on_shards(num_shards, logits, job)


def sample_alone(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    size = logits.shape[1]
    return (
        Sampler(LoneShard(), (0, size), size, BACKEND.best_tokens)
        .sample(logits, SamplingBatch.of(rows, BACKEND.upload))
        .tolist()
    )


TRUNCATIONS = [
    *({"top_k": k} for k in (1, 2, 40, NUM_CANDIDATES, NUM_CANDIDATES + 1, 900)),
    *({"top_p": p} for p in (0.01, 0.3, 0.9, 0.99, 0.999_999)),
    *({"min_p": p} for p in (0.001, 0.1, 0.9, 1.0)),
    {"top_k": 50, "top_p": 0.7},
    {"top_k": 700, "top_p": 0.95},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_k": 600, "top_p": 0.97, "min_p": 0.01},
]


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])  # from nearly uniform, where candidates prove nothing, to peaked
def test_truncation_keeps_what_transformers_keeps(num_shards: int, spread: float) -> None:
    logits = torch.randn(len(TRUNCATIONS), 1003, generator=torch.Generator().manual_seed(3)) * spread
    sampling = [SamplingParams(1.0, 0, **fields) for fields in TRUNCATIONS]
    left = allowed(num_shards, logits, sampling)
    for row, params in enumerate(sampling):
        expected = warped(logits[row : row + 1], params)[0].isfinite()
        differing = left[row] != expected
        # Rounding may decide about one token at the very border of a nucleus, never about more
        assert int(differing.sum()) <= (params.top_p < 1), (params, int(left[row].sum()), int(expected.sum()))


def test_of_equal_logits_the_lower_ids_stay() -> None:
    logits = torch.zeros(3, 12)
    logits[1, [3, 7, 11]] = 2.0
    logits[2, [4, 9]] = -0.0
    sampling = [SamplingParams(1.0, 0, top_k=5), SamplingParams(1.0, 0, top_k=2), SamplingParams(1.0, 0, top_p=0.49)]
    for num_shards in (1, 3, 4):
        left = allowed(num_shards, logits, sampling)
        assert [row.nonzero()[:, 0].tolist() for row in left] == [[0, 1, 2, 3, 4], [3, 7], [0, 1, 2, 3, 4, 5]]
    many = torch.zeros(3, 2 * NUM_CANDIDATES + 88)
    many[2, 7::2] = -1.0  # 303 equal ones, then 297 of a lower score
    sampling = [
        SamplingParams(1.0, 0, top_k=450),
        SamplingParams(1.0, 0, top_p=0.499),
        SamplingParams(1.0, 0, top_k=310),
    ]
    for num_shards in (1, 3, 4):
        left = [row.nonzero()[:, 0].tolist() for row in allowed(num_shards, many, sampling)]
        best = [token for token in range(600) if token < 7 or token % 2 == 0]
        assert left[:2] == [list(range(450)), list(range(300))]
        assert left[2] == sorted(best + list(range(7, 600, 2))[: 310 - len(best)])


def test_the_vocabulary_is_never_gathered() -> None:
    """What is exchanged where candidates prove nothing does not depend on its size."""
    vocab = 20_000
    flat, peaked = torch.zeros(vocab), torch.zeros(vocab)
    peaked[[5, 19_000]] = 15.0
    cut = SamplingParams(1.0, 1, top_p=0.9)

    def gathered(logits: torch.Tensor, sampling: SamplingParams) -> int:
        def job(group: ThreadGroup, mine: torch.Tensor, rows: tuple[int, int]) -> int:
            Sampler(group, rows, vocab, BACKEND.best_tokens).sample(
                mine, SamplingBatch.of([SamplingRow(sampling, 0)], BACKEND.upload)
            )
            return group.num_gathered

        return max(on_shards(2, logits[None], job))

    assert gathered(peaked, SamplingParams(1.0, 1)) == 1
    assert gathered(peaked, cut) == NUM_CANDIDATES + 2
    assert gathered(flat, SamplingParams(1.0, 1, top_k=NUM_CANDIDATES)) == NUM_CANDIDATES + 2
    assert gathered(flat, SamplingParams(1.0, 1, min_p=0.5)) == NUM_CANDIDATES + 2
    assert gathered(flat, cut) < NUM_CANDIDATES + 3 * 2048


def test_sort_keys_order_by_score_then_lowest_id() -> None:
    scores = torch.tensor([float("-inf"), -3e38, -2.5, -1e-40, -0.0, 0.0, 1e-40, 0.5, 3e38, float("inf")])
    ids = torch.tensor([0, 4_000_000_000, 3, 2, 1, 9, 8, 7, 6, 5])
    sort_keys = sort_keys_of(scores, ids)
    assert sort_keys.tolist() == sorted(sort_keys.tolist()[:4]) + sorted(sort_keys.tolist()[4:6], reverse=True) + (
        sorted(sort_keys.tolist()[6:])
    )
    assert sort_keys[3] < sort_keys[5] and sort_keys[4] < sort_keys[6]
    assert torch.equal(scores_of(sort_keys), scores) and torch.equal(ids_of(sort_keys), ids)
    assert int(sort_keys[0]) > NO_TOKEN
    assert ids_of(best_of_shard(torch.tensor([[1.0, 2.0, 2.0]]), 10, 3)).tolist() == [[11, 12, 10]]
    assert best_of_shard(torch.tensor([[1.0]]), 10, 3)[0, 1:].tolist() == [NO_TOKEN] * 2


def test_penalties_are_transformers_and_openais() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(5))
    prompt, generated = [3, 3, 9, 40], [7, 9, 7, 49, 7]
    ids = prompt + generated
    params = [
        SamplingParams(0, repetition_penalty=1.7),
        SamplingParams(0, presence_penalty=0.6, frequency_penalty=-0.4),
        SamplingParams(0),
        SamplingParams(0, repetition_penalty=0.6, frequency_penalty=0.3, logit_bias={7: -1.5, 20: 4.0, 5000: 1.0}),
    ]
    counts = torch.bincount(torch.tensor(generated), minlength=50)
    repeated = [
        RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[row : row + 1].clone())[0]
        for row, penalty in ((0, 1.7), (3, 0.6))
    ]
    expected = logits.clone()
    expected[0] = repeated[0]
    expected[1] = logits[1] - 0.6 * (counts > 0) + 0.4 * counts
    expected[3] = repeated[1] - 0.3 * counts
    expected[3, 7] -= 1.5
    expected[3, 20] += 4.0
    before = logits.clone()
    sampled = [SamplingRow(sampling, len(ids), ids, len(prompt)) for sampling in params]
    processors = LogitsProcessors.of(sampled, BACKEND.upload)
    assert processors is not None
    for num_shards in (1, 3):
        parts = on_shards(num_shards, logits, lambda _, mine, rows: processors.apply(mine, rows[0]))
        torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert torch.equal(logits, before), "log-probabilities are read from these"


def test_stop_ids_are_never_drawn_before_min_tokens() -> None:
    logits = torch.zeros(1, 6)
    logits[0, [2, 4]] = 50.0
    sampling = SamplingParams(0, min_tokens=3, stop_ids=[2, 4, 900], logit_bias={2: 100.0})
    drawn = [sample_alone(logits, [SamplingRow(sampling, position, [], 10)])[0] for position in range(10, 16)]
    assert drawn == [0, 0, 0, 2, 2, 2]
    assert (
        LogitsProcessors.of([SamplingRow(SamplingParams(0, min_tokens=3, stop_ids=[2]), 13, [], 10)], BACKEND.upload)
        is None
    )


def test_only_allowed_ids_are_drawn_on_any_number_of_shards() -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(4))
    allowed_ids = [3, 17, 58, 900]
    rows = [
        SamplingRow(SamplingParams(0, allowed_ids=allowed_ids), 5),
        SamplingRow(SamplingParams(1.0, 7, top_p=0.9, allowed_ids=allowed_ids), 5),
        SamplingRow(SamplingParams(1.0, 7), 5),
        SamplingRow(SamplingParams(0, logit_bias={5: 99.0}, allowed_ids=[41]), 5),
    ]
    expected = logits.clone()
    expected[[0, 1]] = float("-inf")
    expected[:2, allowed_ids[:3]] = logits[:2, allowed_ids[:3]]
    expected[3, :41] = expected[3, 42:] = float("-inf")
    processors = LogitsProcessors.of(rows, BACKEND.upload)
    assert processors is not None
    for num_shards in (1, 3):
        parts = on_shards(num_shards, logits, lambda _, mine, vocab_rows: processors.apply(mine, vocab_rows[0]))
        assert torch.equal(torch.cat(parts, 1), expected)
        drawn = sample_on(num_shards, logits, rows)
        assert drawn == [drawn[0]] * num_shards
        assert drawn[0][0] == int(expected[0].argmax()) and drawn[0][1] in allowed_ids and drawn[0][3] == 41


BAD_WORDS = [[7], [3, 9], [3, 3, 12], [8, 3, 9, 14], [30, 31]]


@pytest.mark.parametrize("num_unknown", [0, 1, 2])
def test_bad_words_are_transformers_though_the_host_does_not_know_the_last_ids(num_unknown: int) -> None:
    """Random ends of few ids, so that words are begun often; each beside Transformers' own processor."""
    generator = torch.Generator().manual_seed(6)
    sampled_ids = SampledIds(40, 4, torch.device("cpu"))
    logits = torch.randn(40, 50, generator=generator)
    rows, expected, num_hits = [], logits.clone(), 0
    for index in range(40):
        ids = [8, 3, 3, 9, 30][index % 5 :][: 1 + index % 3] + torch.tensor([3, 9, 8, 30])[
            torch.randint(4, (index % 4,), generator=generator)
        ].tolist()
        known = ids[: max(1, len(ids) - num_unknown)] + [UNKNOWN_ID] * min(num_unknown, len(ids) - 1)
        for position in range(len(ids)):
            sampled_ids.put(torch.tensor([index]), torch.tensor([position]), torch.tensor([ids[position]]))
        rows.append(SamplingRow(SamplingParams(0, bad_words=BAD_WORDS), len(ids), known, 1, index))
        processor = NoBadWordsLogitsProcessor(BAD_WORDS)
        expected[index] = processor(torch.tensor([ids]), logits[index : index + 1].clone())[0]
        num_hits += int(expected[index].isinf().sum()) > 1
    assert num_hits > 10
    processors = LogitsProcessors.of(rows, BACKEND.upload, sampled_ids)
    assert processors is not None
    for num_shards in (1, 3):
        parts = on_shards(num_shards, logits, lambda _, mine, vocab_rows: processors.apply(mine, vocab_rows[0]))
        found = torch.cat(parts, 1)
        assert torch.equal(found, expected.clamp(min=BAD_WORD))  # one value, whoever knows the ids


def test_a_bad_word_is_as_bad_where_the_host_does_not_know_it_yet() -> None:
    sampling = SamplingParams(
        0, bad_words=[[1], [2], [5, 1], [4, 5, 1]], allowed_ids=[1, 2], logit_bias={1: 7.0, 2: -7.0}
    )
    sampled_ids = SampledIds(1, 4, torch.device("cpu"))
    sampled_ids.put(torch.tensor([0]), torch.tensor([1]), torch.tensor([5]))
    logits, found = torch.zeros(1, 9), []
    for ids in ([4, 5], [4, UNKNOWN_ID]):
        processors = LogitsProcessors.of([SamplingRow(sampling, 2, ids, 1)], BACKEND.upload, sampled_ids)
        assert processors is not None
        found.append(processors.apply(logits, 0))
    assert torch.equal(*found) and found[0][0, 1] == found[0][0, 2] == torch.tensor(BAD_WORD)


def test_a_bad_word_is_written_where_nothing_else_is_allowed() -> None:
    row = SamplingRow(SamplingParams(1.0, 3, top_p=0.5, allowed_ids=[5], bad_words=[[5], [5, 5]]), 3, [5, 5, 5], 1)
    assert sample_alone(torch.zeros(1, 9), [row]) == [5]


def mixed_rows(num: int, vocab: int) -> list[SamplingRow]:
    """Every parameter alone and with others, over random histories."""
    generator = torch.Generator().manual_seed(8)
    kinds = [
        {},
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"top_k": 3},
        {"top_p": 0.6, "presence_penalty": 0.9},
        {"min_p": 0.2, "frequency_penalty": 1.1},
        {"top_k": 300, "top_p": 0.9, "logit_bias": {1: 3.0, vocab - 1: 2.0}},
        {"temperature": 0.0},
        {"temperature": 1.7, "min_tokens": 9, "stop_ids": [0, 5], "repetition_penalty": 0.8, "top_p": 0.97},
        {"bad_words": [[token] for token in range(vocab // 2)], "top_k": 9},
        {"allowed_ids": list(range(5, 60, 3)), "presence_penalty": 0.4},
    ]
    rows = []
    for row in range(num):
        ids = torch.randint(vocab, (5 + row,), generator=generator).tolist()
        sampling = SamplingParams(**{"temperature": 0.7, "seed": row, **kinds[row % len(kinds)]})
        rows.append(SamplingRow(sampling, len(ids), ids, 4))
    return rows


@pytest.mark.parametrize("vocab", [103, 2003])
def test_neither_shards_nor_neighbors_change_what_is_drawn(vocab: int) -> None:
    rows = mixed_rows(48, vocab)
    logits = torch.randn(48, vocab, generator=torch.Generator().manual_seed(9))
    together = sample_alone(logits, rows)
    assert together == [sample_alone(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    plain = [dataclasses.replace(row, sampling=SamplingParams(0.7, i)) for i, row in enumerate(rows)]
    assert sum(a != b for a, b in zip(together, sample_alone(logits, plain), strict=True)) > 10
    for num_shards in (2, 3, 4):
        assert sample_on(num_shards, logits, rows) == [together] * num_shards


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0.6},
        {"temperature": 1.3, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8, "temperature": 2.0},
        {"presence_penalty": 0.7, "frequency_penalty": 0.5},
        {"logit_bias": {2: 1.5, 9: -1.0}, "temperature": 1.5},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "min_p": 0.1, "logit_bias": {15: 2.0}, "presence_penalty": 1.0},
    ],
    ids="+".join,
)
def test_draws_follow_the_exact_probabilities(parameters: dict[str, Any]) -> None:
    logits = torch.linspace(-1.5, 1.5, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    prompt, generated = [1, 2, 3], [4, 5, 4, 15]
    rows = [
        SamplingRow(
            SamplingParams(**{"temperature": 1.0, "seed": i % 100, **parameters}), 7 + i // 100, prompt + generated, 3
        )
        for i in range(NUM_DRAWS)
    ]
    drawn = torch.tensor(sample_alone(logits.expand(NUM_DRAWS, -1), rows))
    probabilities = exact(logits, rows[0].sampling, prompt, generated)
    counts = torch.bincount(drawn, minlength=16).double()
    assert not counts[probabilities == 0].any()
    is_left = probabilities > 0
    expected = probabilities[is_left] * NUM_DRAWS
    assert expected.min() > 5
    distance = float(((counts[is_left] - expected) ** 2 / expected).sum())
    degrees = int(is_left.sum()) - 1
    # Wilson and Hilferty's approximation of the 99.9 % quantile
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert 0 < distance < limit, (distance, limit, degrees)


def exact(logits: torch.Tensor, params: SamplingParams, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """Written out in float64 for one row."""
    scores = logits.double().clone()
    for token in set(prompt + generated):
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in generated:
        scores[token] -= params.frequency_penalty
    for token in set(generated):
        scores[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    return warped(scores[None], params)[0].softmax(0)
