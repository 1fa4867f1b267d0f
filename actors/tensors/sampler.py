"""Draws the next ids from logits that are cut by vocabulary: the same ids on every shard, without gathering them.

R rows to sample · V vocabulary rows of this shard. Temperature is an exponential race (equivalently Gumbel noise): with
E independent Exp(1) per token, argmax(logit / temperature - log E) is distributed as softmax(logit / temperature).
E is a pure function of (seed, position, token id), so that neither the layout nor a replay changes what is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.decisions.shard_plan import Interval
from actors.words.messages import SamplingParams
from cluster.collectives import StageGroup

# The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_WEYL = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_MASK64 = (1 << 64) - 1
_FRACTION_BITS = 53
_ELEMENTS_AT_ONCE = 1 << 17  # on CPU the hash of so many stays in the core's cache


@dataclass(frozen=True)
class Draws:
    """How each of R rows is drawn, on the device."""

    temperatures_R1: torch.Tensor | None  # float32, 1 where greedy; None: all rows are greedy
    greedy_R1: torch.Tensor | None  # bool
    keys_R1: torch.Tensor | None  # int64, of (seed, position)

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams, int]], device: torch.device) -> "Draws":
        """From each row's parameters and the position of the token that is drawn."""
        if all(params.temperature == 0 for params, _ in rows):
            return cls(None, None, None)
        assert all(params.temperature == 0 or params.seed is not None for params, _ in rows), "the engine draws a seed"
        temperatures = torch.tensor([[params.temperature or 1.0] for params, _ in rows], dtype=torch.float32)
        greedy = torch.tensor([[params.temperature == 0] for params, _ in rows])
        keys = torch.tensor([[noise_key(params.seed or 0, position)] for params, position in rows])
        return cls(*(tensor.to(device, non_blocking=True) for tensor in (temperatures, greedy, keys)))


@dataclass(frozen=True)
class Candidates:
    """The best tokens of each row, C a shard: what shards exchange instead of logits."""

    scores_RC: torch.Tensor  # float32, best first
    ids_RC: torch.Tensor  # int64, in the whole vocabulary


class Sampler:
    """One shard's part in sampling. All shards of the last stage call it with the same rows."""

    def __init__(self, group: StageGroup, vocab_rows: Interval) -> None:
        self.group = group
        self.vocab_rows = vocab_rows

    def sample(self, logits_RV: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Logits of this shard's vocabulary rows → ids [R], int64, the same on every shard."""
        if not logits_RV.shape[0]:
            return torch.empty(0, dtype=torch.int64, device=logits_RV.device)
        scores_RV = self._scores(logits_RV.float(), draws)
        return self._best_of_all_shards(self._candidates(scores_RV))

    def _scores(self, logits_RV: torch.Tensor, draws: Draws) -> torch.Tensor:
        """What the arg-max is taken of: the logits themselves where greedy, perturbed ones elsewhere."""
        if draws.temperatures_R1 is None:
            return logits_RV
        assert draws.keys_R1 is not None
        assert draws.greedy_R1 is not None
        first, end = self.vocab_rows
        ids_V = torch.arange(first, end, device=logits_RV.device)
        scores_RV = logits_RV / draws.temperatures_R1
        num_rows = logits_RV.shape[0]
        rows_at_once = num_rows if logits_RV.is_cuda else max(1, _ELEMENTS_AT_ONCE // max(1, end - first))
        for row in range(0, num_rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            scores_RV[rows] -= exponential(draws.keys_R1[rows], ids_V).log_()
        return torch.where(draws.greedy_R1, logits_RV, scores_RV)

    def _candidates(self, scores_RV: torch.Tensor) -> Candidates:
        best = scores_RV.max(dim=1, keepdim=True)  # of equal ones the first, that is the lowest id
        return Candidates(best.values, best.indices + self.vocab_rows[0])

    def _best_of_all_shards(self, mine: Candidates) -> torch.Tensor:
        # float64 holds a float32 score and an id exactly, so that one small gather does for both
        pair_R2 = torch.cat([mine.scores_RC.double(), mine.ids_RC.double()], dim=1)
        pairs_PR2 = self.group.all_gather(pair_R2)
        # Shards lie in vocabulary order, and of equal scores the first wins: the lowest id
        shard_1R = pairs_PR2[:, :, 0].argmax(dim=0, keepdim=True)
        return pairs_PR2[:, :, 1].gather(0, shard_1R)[0].long()


def noise_key(seed: int, position: int) -> int:
    """A 64-bit key (as a signed integer) of one draw: a seed's low 64 bits and the position of the token drawn."""
    return _signed(_mix(_mix(seed & _MASK64) + position * _WEYL & _MASK64))


def exponential(keys_R1: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
    """Exp(1) noise [R, V], float32, a pure function of key and id.

    -log(1 - w) with w of 53 bits: near w = 0, where races are won, float32 keeps its full relative precision, and the
    largest Gumbel value is 37. w stays below 1, so that noise is always finite.
    """
    # Multiplication of int64 wraps around, as the hash needs; its right shift copies the sign, which the mask removes
    x_RV = keys_R1 + ids_V * _signed(_WEYL)
    for shift, multiplier in _STEPS:
        x_RV.bitwise_xor_((x_RV >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(multiplier))
    x_RV.bitwise_xor_((x_RV >> _LAST_SHIFT).bitwise_and_((1 << (64 - _LAST_SHIFT)) - 1))
    bits_RV = x_RV.bitwise_right_shift_(64 - _FRACTION_BITS).bitwise_and_((1 << _FRACTION_BITS) - 1)
    w_RV = bits_RV.float().add_(0.5).mul_(2.0**-_FRACTION_BITS).clamp_(max=1 - 2.0**-24)
    return w_RV.neg_().log1p_().neg_()


def _mix(x: int) -> int:
    """The same finaliser on one unsigned 64-bit number."""
    for shift, multiplier in _STEPS:
        x = (x ^ x >> shift) * multiplier & _MASK64
    return x ^ x >> _LAST_SHIFT


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
