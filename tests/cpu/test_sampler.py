"""Sampling: the drawn distribution is the softmax, noise is a pure function, and no sharding changes what is drawn."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from actors.decisions.model.shard_plan import split_evenly
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.sampling.grammar_masks import NO_MASK_YET
from actors.tensors.sampling.logits_processors import SamplingRow
from actors.tensors.sampling.noise import exponential, noise_key
from actors.tensors.sampling.sampler import Sampler, SamplingBatch
from actors.words.messages import GRAMMAR_FAILED, NOT_A_NUMBER, SamplingParams
from cluster.collectives.interface import LoneShard

BACKEND = CPUBackend(torch.device("cpu"))
CHI_SQUARE_999_OF_15 = 37.70  # the 99.9 % quantile with 15 degrees of freedom


class ThreadGroup:
    """Shards as threads of one process."""

    def __init__(self, size: int, shard: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.size, self.shard, self.slots, self.barrier = size, shard, slots, barrier

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the sampler sums nothing")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.numel() <= 2 * 16, "the vocabulary must not be gathered"
        self.slots[self.shard] = tensor
        self.barrier.wait(10)
        return torch.stack(self.slots)

    def abort(self) -> None: ...

    def close(self) -> None: ...


def sample_on(
    num_shards: int,
    logits: torch.Tensor,
    rows: list[tuple[SamplingParams, int]],
    outcomes: Sequence[dict[int, int]] | None = None,
) -> list[list[int]]:
    """The ids that every shard samples; `outcomes` of each shard."""
    slots, barrier, drawn = [None] * num_shards, threading.Barrier(num_shards), [[]] * num_shards

    def run(shard: int) -> None:
        first, end = split_evenly(logits.shape[1], shard, num_shards)
        sampler = Sampler(
            ThreadGroup(num_shards, shard, slots, barrier), (first, end), logits.shape[1], BACKEND.best_tokens
        )
        mine = outcomes[shard] if outcomes else {}
        batch = SamplingBatch.of([SamplingRow(*row) for row in rows], BACKEND.upload, outcomes=mine)
        drawn[shard] = sampler.sample(logits[:, first:end], batch).tolist()

    threads = [threading.Thread(target=run, args=(shard,)) for shard in range(num_shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return drawn


def sample_alone(logits: torch.Tensor, rows: list[tuple[SamplingParams, int]]) -> list[int]:
    return (
        Sampler(LoneShard(), (0, logits.shape[1]), logits.shape[1], BACKEND.best_tokens)
        .sample(logits, SamplingBatch.of([SamplingRow(*row) for row in rows], BACKEND.upload))
        .tolist()
    )


def test_what_one_shard_has_in_place_of_an_id_all_shards_have() -> None:
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    logits[3, 0] = float("nan")
    rows = [(SamplingParams(1.0, seed), 3) for seed in range(4)]
    alone = sample_alone(logits, rows)
    expected = [GRAMMAR_FAILED, NO_MASK_YET, alone[2], NOT_A_NUMBER]
    drawn = sample_on(2, logits, rows, ({0: GRAMMAR_FAILED}, {1: NO_MASK_YET, 3: NO_MASK_YET}))
    assert drawn == [expected, expected]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("vary", [lambda i: (7, i), lambda i: (i, 7), lambda i: (i << 40, i)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_ids_follow_the_softmax(temperature: float, vary: Callable[[int], tuple[int, int]]) -> None:
    num_draws = 40_000
    logits = torch.linspace(-1.5, 1.5, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    rows = []
    for i in range(num_draws):
        seed, position = vary(i)
        rows.append((SamplingParams(temperature, seed), position))
    ids = torch.tensor(sample_alone(logits.expand(num_draws, -1), rows))
    counts = torch.bincount(ids, minlength=16).double()
    assert chi_square(counts, torch.softmax(logits.double() / temperature, 0)) < CHI_SQUARE_999_OF_15


@pytest.mark.timeout(60)
def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    # One likely token against 50,000 unlikely ones that weigh as much together: wins in the far tail of the noise
    vocab, num_draws = 50_001, 2_000
    logits = torch.zeros(vocab)
    logits[123] = torch.tensor(50_000.0).log()
    rows = [(SamplingParams(1.0, seed), 3) for seed in range(num_draws)]
    ids = torch.tensor(sample_alone(logits.expand(num_draws, -1), rows))
    hits = int((ids == 123).sum())
    assert abs(hits - num_draws / 2) < 4 * (num_draws / 4) ** 0.5
    rest = ids[ids != 123]
    assert abs(float(rest.double().mean()) / vocab - 0.5) < 4 * (1 / 12 / len(rest)) ** 0.5
    assert len(set(rest.tolist())) > 0.95 * len(rest)


@pytest.mark.timeout(60)
def test_draws_at_neighboring_positions_and_ids_are_independent() -> None:
    keys = torch.tensor([[noise_key(5, position)] for position in range(300)])
    noise = exponential(keys, torch.arange(300)).double()
    assert abs(float(noise.mean()) - 1) < 0.02
    assert abs(float(noise.var()) - 1) < 0.05
    for other in (noise.roll(1, 0), noise.roll(1, 1), noise.T):
        both = torch.stack([noise.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.02


def test_noise_is_the_documented_hash() -> None:
    def finalize(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    assert finalize(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0
    for seed, position, token in ((0, 0, 0), (2**63 - 1, 131_071, 128_255), (12345, 7, 31_999)):
        key = finalize((finalize(seed) + position * 0x9E3779B97F4A7C15) % 2**64)
        bits = finalize((key + token * 0x9E3779B97F4A7C15) % 2**64) >> 11
        expected = -torch.log1p(-torch.tensor((bits + 0.5) * 2.0**-53, dtype=torch.float64))
        drawn = exponential(torch.tensor([[noise_key(seed, position)]]), torch.tensor([token]))
        assert float(drawn) == pytest.approx(float(expected), rel=1e-5)


def test_noise_is_finite_and_fine_near_zero() -> None:
    keys = torch.tensor([[noise_key(seed, 0)] for seed in range(40)])
    noise = exponential(keys, torch.arange(50_000))
    assert noise.isfinite().all()
    assert noise.min() > 0
    smallest = noise.flatten().sort().values[:200]
    assert len(smallest.unique()) == 200, "ties where the arg-max is decided"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_sharding_changes_nothing(num_shards: int) -> None:
    logits = torch.randn(16, 103, generator=torch.Generator().manual_seed(1))
    rows = [(SamplingParams(0 if row % 3 == 0 else 0.3 * row, row * 977), row + 5) for row in range(16)]
    expected = sample_alone(logits, rows)
    assert sample_on(num_shards, logits, rows) == [expected] * num_shards
    assert [expected[row] for row in range(0, 16, 3)] == logits[::3].argmax(-1).tolist()
    assert expected != logits.argmax(-1).tolist()


@pytest.mark.timeout(60)
def test_of_equal_logits_greedy_takes_the_lowest_id() -> None:
    logits = torch.zeros(2, 12)
    logits[0, [3, 7, 11]] = 2.0
    logits[1, [8, 9]] = 2.0
    rows = [(SamplingParams(temperature=0), 0)] * 2
    for num_shards in (1, 3, 4):
        assert sample_on(num_shards, logits, rows) == [[3, 8]] * num_shards


def test_a_row_does_not_depend_on_its_neighbors() -> None:
    logits = torch.randn(9, 70, generator=torch.Generator().manual_seed(2))
    rows = [(SamplingParams(1.0 if row % 2 else 0, row), 50 + row) for row in range(9)]
    together = sample_alone(logits, rows)
    assert together == [sample_alone(logits[row : row + 1], rows[row : row + 1])[0] for row in range(9)]


def test_only_an_allowed_token_is_ever_drawn() -> None:
    logits = torch.full((500, 64), float("-inf"))
    logits[:, 17] = -3.0
    rows = [(SamplingParams(1.0, seed), 0) for seed in range(500)]
    assert set(sample_alone(logits, rows)) == {17}


def test_no_rows_give_no_ids() -> None:
    assert sample_alone(torch.empty(0, 10), []) == []


def test_temperature_without_a_seed_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="seed"):
        SamplingBatch.of([SamplingRow(SamplingParams(1.0), 0)], BACKEND.upload)
