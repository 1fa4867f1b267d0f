"""Which tokens top_k, top_p and min_p leave: one threshold a row, agreed by all shards without a whole gather.

Over softmax(logit / temperature), each cut over what the one before left, as Transformers does:
top_k keeps the k best; top_p the smallest set of the best whose share of the rest is at least top_p, the token that
reaches it included; min_p whatever has at least that share of the most likely token's probability. Of equal logits the
lower id stands higher. A threshold is a sort_key (see sort_key.py).

R rows to sample · K of them that are cut · V vocabulary rows of this shard · C candidates · P shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.decisions.model.shard_plan import Interval
from actors.tensors.backend import Upload
from actors.tensors.sampling.logits_processors import SamplingRow
from actors.tensors.sampling.ranking import NOTHING, best_of_all, best_of_shard, lowest_key_with, scores_of
from cluster.collectives.interface import StageGroup

NUM_CANDIDATES = 256  # of each shard; nearly always they hold the nucleus
_ROWS_AT_ONCE = 16  # whose whole vocabulary is gathered together
_ALL = 1 << 62


@dataclass(frozen=True)
class Truncation:
    """How K of the R rows are cut, on the device."""

    rows_K: torch.Tensor  # int64
    top_k_K1: torch.Tensor  # int64; _ALL where not asked
    top_p_K1: torch.Tensor  # float64; infinite where not asked
    log_min_p_K1: torch.Tensor  # float32; -inf where not asked
    proven_with: int | None = None  # candidates that prove every row's threshold; None: that depends on the logits

    @classmethod
    def of(cls, draws: Sequence[SamplingRow], upload: Upload) -> "Truncation | None":
        """None where no row is cut; greedy rows never are."""
        cut = [(row, draw.sampling) for row, draw in enumerate(draws) if _is_cut(draw)]
        if not cut:
            return None
        infinity = float("inf")
        on_host = (
            torch.tensor([row for row, _ in cut]),
            torch.tensor([[params.top_k or _ALL] for _, params in cut]),
            torch.tensor([[params.top_p if params.top_p < 1 else infinity] for _, params in cut], dtype=torch.float64),
            torch.tensor([[params.min_p] for _, params in cut], dtype=torch.float32).log(),
        )
        leaves_open = any(params.top_p < 1 and not params.top_k for _, params in cut)
        proven_with = None if leaves_open else max(params.top_k for _, params in cut)
        rows, top_k, top_p, log_min_p = (upload(tensor) for tensor in on_host)
        return cls(rows, top_k, top_p, log_min_p, proven_with)

    def subset(self, rows: torch.Tensor) -> "Truncation":
        """Some of the K."""
        return Truncation(self.rows_K[rows], self.top_k_K1[rows], self.top_p_K1[rows], self.log_min_p_K1[rows])

    def thresholds(self, best_KC: torch.Tensor, log_total_K1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the best sort_keys of the whole vocabulary → (lowest sort_key kept [K, 1], whether that is proven [K]).

        `log_total_K1`: log of the sum of exp(score) over the whole vocabulary, float64.
        """
        scores_KC = scores_of(best_KC)
        best_K1 = scores_KC[:, :1]
        places_C = torch.arange(best_KC.shape[1], device=best_KC.device)
        is_top_KC = places_C < self.top_k_K1
        weights_KC = (scores_KC - best_K1).double().exp() * is_top_KC
        reached_KC = weights_KC.cumsum(1)
        total_K1 = (log_total_K1 - best_K1).exp()
        knows_top_K1 = self.top_k_K1 <= best_KC.shape[1]
        share_K1 = self.top_p_K1 * torch.where(knows_top_K1, reached_KC[:, -1:], total_K1)
        num_kept_K1 = (is_top_KC & (reached_KC - weights_KC < share_K1)).sum(1, keepdim=True).clamp_(min=1)
        is_listed_K1 = (self.top_k_K1 < _ALL) | self.top_p_K1.isfinite()
        lowest_K1 = best_KC.gather(1, num_kept_K1 - 1).where(is_listed_K1, NOTHING)
        is_proven_K1 = ~is_listed_K1 | knows_top_K1 | ((self.top_k_K1 == _ALL) & (reached_KC[:, -1:] >= share_K1))
        return lowest_K1.maximum(lowest_key_with(best_K1 + self.log_min_p_K1)), is_proven_K1[:, 0]


def truncation_thresholds(
    scores_KV: torch.Tensor, cuts: Truncation, group: StageGroup, vocab_rows: Interval, vocab_size: int
) -> torch.Tensor:
    """Scores (logits / temperature) of this shard → the lowest sort_key that each row keeps [K, 1], on every shard.

    Shards exchange their candidates and log-sum-exp; the vocabulary only of rows whose candidates prove no threshold.
    """
    best_KC = best_of_shard(scores_KV, vocab_rows[0], min(NUM_CANDIDATES, vocab_size))
    # One gather for both: the bits of a float64 fill an int64
    log_total_K1 = scores_KV.logsumexp(1, keepdim=True).double()
    gathered_PKC = group.all_gather(torch.cat([best_KC, log_total_K1.view(torch.int64)], dim=1))
    log_total_K1 = gathered_PKC[:, :, -1:].contiguous().view(torch.float64).logsumexp(0)
    best_KC = best_of_all(gathered_PKC[:, :, :-1], best_KC.shape[1])
    thresholds_K1, is_proven_K = cuts.thresholds(best_KC, log_total_K1)
    if cuts.proven_with is not None and cuts.proven_with <= best_KC.shape[1]:
        return thresholds_K1  # known without asking the device
    open_rows = (~is_proven_K).nonzero()[:, 0]
    widest = -(-vocab_size // group.size)  # shards differ by one row at most, and a gather wants equal shapes
    for first in range(0, len(open_rows), _ROWS_AT_ONCE):
        rows = open_rows[first : first + _ROWS_AT_ONCE]
        mine = best_of_shard(scores_KV[rows], vocab_rows[0], widest)
        everything = best_of_all(group.all_gather(mine), vocab_size)
        log_totals = scores_of(everything).double().logsumexp(1, keepdim=True)
        thresholds_K1[rows], _ = cuts.subset(rows).thresholds(everything, log_totals)
    return thresholds_K1


def _is_cut(draw: SamplingRow) -> bool:
    sampling = draw.sampling
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
