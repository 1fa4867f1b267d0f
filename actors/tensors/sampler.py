"""Draws the next ids from logits that are cut by vocabulary: the same ids on every shard, without gathering them.

R rows to sample · V vocabulary rows of this shard. Temperature is an exponential race (equivalently Gumbel noise): with
E independent Exp(1) per token, argmax(logit / temperature - log E) is distributed as softmax(logit / temperature).
Cuts let fewer tokens run. What a row draws depends on nothing but its own logits, parameters and history.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.decisions.shard_plan import Interval
from actors.tensors.cuts import Cuts, cut_thresholds
from actors.tensors.edits import Draw, Edits
from actors.tensors.noise import exponential, noise_key
from actors.tensors.standing import ids_of, scores_of, standings_of
from cluster.collectives import StageGroup

_ELEMENTS_AT_ONCE = 1 << 17  # on CPU the noise of so many stays in the core's cache


@dataclass(frozen=True)
class Draws:
    """How each of R rows is drawn, on the device."""

    temperatures_R1: torch.Tensor | None  # float32, 1 where greedy; None: all rows are greedy
    greedy_R1: torch.Tensor | None  # bool
    keys_R1: torch.Tensor | None  # int64, of (seed, position)
    edits: Edits | None
    cuts: Cuts | None

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> "Draws":
        """One draw a row."""
        edits = Edits.of(draws, device)
        sampling = [draw.sampling for draw in draws]
        if all(params.temperature == 0 for params in sampling):
            return cls(None, None, None, edits, None)
        assert all(params.temperature == 0 or params.seed is not None for params in sampling), "the engine draws a seed"
        temperatures = torch.tensor([[params.temperature or 1.0] for params in sampling], dtype=torch.float32)
        greedy = torch.tensor([[params.temperature == 0] for params in sampling])
        keys = torch.tensor([[noise_key(draw.sampling.seed or 0, draw.position)] for draw in draws])
        temperatures, greedy, keys = (x.to(device, non_blocking=True) for x in (temperatures, greedy, keys))
        return cls(temperatures, greedy, keys, edits, Cuts.of(draws, device))


class Sampler:
    """One shard's part in sampling. All shards of the last stage call it with the same rows."""

    def __init__(self, group: StageGroup, vocab_rows: Interval, vocab_size: int) -> None:
        self.group = group
        self.vocab_rows = vocab_rows
        self.vocab_size = vocab_size

    def sample(self, logits_RV: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Logits of this shard's vocabulary rows → ids [R], int64, the same on every shard."""
        if not logits_RV.shape[0]:
            return torch.empty(0, dtype=torch.int64, device=logits_RV.device)
        logits_RV = logits_RV.float()
        if draws.edits is not None:
            logits_RV = draws.edits.apply(logits_RV, self.vocab_rows[0])
        return self._best_of_all_shards(self._scores(logits_RV, draws))

    def _scores(self, logits_RV: torch.Tensor, draws: Draws) -> torch.Tensor:
        """What the arg-max is taken of: the logits themselves where greedy, perturbed ones elsewhere."""
        if draws.temperatures_R1 is None:
            return logits_RV
        assert draws.keys_R1 is not None
        assert draws.greedy_R1 is not None
        first, end = self.vocab_rows
        ids_V = torch.arange(first, end, device=logits_RV.device)
        scores_RV = logits_RV / draws.temperatures_R1
        if draws.cuts is not None:
            self._cut(scores_RV, draws.cuts, ids_V)
        num_rows = logits_RV.shape[0]
        rows_at_once = num_rows if logits_RV.is_cuda else max(1, _ELEMENTS_AT_ONCE // max(1, end - first))
        for row in range(0, num_rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            scores_RV[rows] -= exponential(draws.keys_R1[rows], ids_V).log_()
        return torch.where(draws.greedy_R1, logits_RV, scores_RV)

    def _cut(self, scores_RV: torch.Tensor, cuts: Cuts, ids_V: torch.Tensor) -> None:
        """Take the tokens that may not be drawn out of the race."""
        scores_KV = scores_RV.index_select(0, cuts.rows_K)
        lowest_K1 = cut_thresholds(scores_KV, cuts, self.group, self.vocab_rows, self.vocab_size)
        lowest_score_K1, last_id_K1 = scores_of(lowest_K1), ids_of(lowest_K1)
        is_out_KV = (scores_KV < lowest_score_K1) | ((scores_KV == lowest_score_K1) & (ids_V > last_id_K1))
        scores_RV.index_copy_(0, cuts.rows_K, scores_KV.masked_fill_(is_out_KV, float("-inf")))

    def _best_of_all_shards(self, scores_RV: torch.Tensor) -> torch.Tensor:
        best = scores_RV.max(dim=1)  # of equal ones the first, that is the lowest id
        standings_PR = self.group.all_gather(standings_of(best.values, best.indices + self.vocab_rows[0]))
        return ids_of(standings_PR.amax(dim=0))
