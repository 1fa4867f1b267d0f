"""The Gumbel arg-max on CPU against the same written out in torch."""

import math

import pytest
import torch

from actors.tensors.backends.cpu.gumbel_argmax import gumbel_argmax
from actors.tensors.sampling.noise import exponential, noise_key

FIRST_ID = 1000


def keys_of(num_rows: int) -> torch.Tensor:
    return torch.tensor([[noise_key(11, position)] for position in range(num_rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ids", [1, 7, 512, 513, 5000])
def test_greedy_rows_take_the_first_of_the_highest(dtype: torch.dtype, num_ids: int) -> None:
    logits = torch.randn(40, num_ids).to(dtype)
    scores, ids = gumbel_argmax(logits, FIRST_ID, None, None)
    best = logits.float().max(dim=1)
    assert torch.equal(scores, best.values)
    assert torch.equal(ids, best.indices + FIRST_ID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-6, 0.7, 30.0])
def test_noise_is_that_of_the_hash(dtype: torch.dtype, temperature: float) -> None:
    logits, keys = torch.randn(60, 3000).to(dtype), keys_of(60)
    temperatures = torch.full((60, 1), temperature)
    temperatures[::3] = 0
    scores, ids = gumbel_argmax(logits, FIRST_ID, temperatures, keys)
    noise = exponential(keys, torch.arange(FIRST_ID, FIRST_ID + 3000)).double()
    expected = torch.where(temperatures > 0, logits.double() / temperatures - noise.log(), logits.double())
    found = expected.gather(1, (ids - FIRST_ID).unsqueeze(1))[:, 0]
    size = expected.abs().amax(dim=1)
    assert bool((expected.amax(dim=1) - found <= 1e-6 * size).all())  # who wins is at most a rounding behind
    assert bool(((scores - found).abs() <= 1e-6 * size).all())


def test_noise_is_as_fine_as_the_hash_where_races_are_won_and_lost() -> None:
    """One token alone: its score is minus the logarithm of its noise, which spans 50 powers of two."""
    keys = keys_of(30_000)
    scores, _ = gumbel_argmax(torch.zeros(30_000, 1), FIRST_ID, torch.ones(30_000, 1), keys)
    expected = -exponential(keys, torch.tensor([FIRST_ID])).double().log()[:, 0]
    assert expected.max() > 9 and expected.min() < -2
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-6)


def test_nan_is_above_all_and_zeros_are_equal() -> None:
    rows = [[0.0, math.nan, math.inf], [-math.inf] * 3, [-0.0, 0.0, -1.0], [-1.0, -0.0, 0.0], [-math.nan, 1.0, 2.0]]
    logits = torch.tensor(rows)
    for temperatures in (None, torch.ones(len(rows), 1)):
        scores, ids = gumbel_argmax(logits, 0, temperatures, keys_of(len(rows)))
        assert scores.isnan().tolist() == [True, False, False, False, True]
        assert ids.tolist()[0] == 1 and ids.tolist()[4] == 0
        assert scores[1] == -math.inf
    scores, ids = gumbel_argmax(logits, 0, None, None)
    assert ids.tolist() == [1, 0, 0, 1, 0]
    assert scores[2:4].tolist() == [0.0, 0.0]
