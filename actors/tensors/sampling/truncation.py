"""Truncation by top_k, top_p and min_p: one threshold a row, the same on every shard, without a full gather.

They apply to softmax(logit / temperature) one after the other, each to the tokens that the one before kept, as in
Transformers: top_k keeps the k best tokens; top_p the smallest set of the best whose share of their probability is at
least top_p; min_p the tokens with at least that share of the likeliest token's probability. Of equal logits the lower
id ranks higher. A threshold is a sort key (see ranking.py).

R rows to sample · K of them that are truncated · U of these that candidates may not decide · V vocabulary rows of this
shard · C candidates · P shards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from actors.decisions.model.memory import SEARCHED_AT_ONCE
from actors.decisions.model.shard_plan import Interval
from actors.tensors.backend import Upload
from actors.tensors.sampling.logits_processors import SamplingRow
from actors.tensors.sampling.ranking import NO_TOKEN, best_of_all, best_of_shard, lowest_sort_keys_of, scores_of
from actors.tensors.sampling.vocabulary_search import Vocabulary
from actors.words.messages import SamplingParams
from cluster.collectives.interface import StageGroup

NUM_CANDIDATES = 256  # best tokens of each shard; nearly always they contain the nucleus
VocabularySearch = Callable[..., torch.Tensor | None]  # see Backend.lowest_kept
_ALL = 1 << 62  # top_k of rows that do not use it


@dataclass(frozen=True)
class Truncation:
    """The truncation of K of the R rows, on the device."""

    rows_K: torch.Tensor  # int64
    top_k_K1: torch.Tensor  # int64; _ALL where unused
    top_p_K1: torch.Tensor  # float64; infinite where unused
    log_min_p_K1: torch.Tensor  # float32; -inf where unused
    open_rows_U: torch.Tensor | None = None  # int64, among the K: whether candidates decide depends on the logits
    has_large_top_k: bool = False  # one of these uses top_k

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], upload: Upload) -> "Truncation | None":
        """None where no row is truncated; greedy rows never are."""
        indices = [index for index, row in enumerate(rows) if _is_truncated(row)]
        if not indices:
            return None
        sampling = [rows[index].sampling for index in indices]
        top_p = [[params.top_p if params.top_p < 1 else float("inf")] for params in sampling]
        on_host = (
            torch.tensor(indices),
            torch.tensor([[params.top_k or _ALL] for params in sampling]),
            torch.tensor(top_p, dtype=torch.float64),
            torch.tensor([[params.min_p] for params in sampling], dtype=torch.float32).log(),
        )
        open_rows = [row for row, params in enumerate(sampling) if _may_need_more_than_candidates(params)]
        open_rows_U = upload(torch.tensor(open_rows)) if open_rows else None
        has_large_top_k = any(params.top_k > NUM_CANDIDATES for params in sampling)
        rows_K, top_k_K1, top_p_K1, log_min_p_K1 = (upload(tensor) for tensor in on_host)
        return cls(rows_K, top_k_K1, top_p_K1, log_min_p_K1, open_rows_U, has_large_top_k)

    def thresholds(self, best_KC: torch.Tensor, log_total_K1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best sort keys [K, C] of the whole vocabulary → (lowest sort key kept [K, 1], whether it is proven [K]).

        `log_total_K1`: log of the sum of exp(score) over the whole vocabulary, float64.
        """
        scores_KC = scores_of(best_KC)
        best_K1 = scores_KC[:, :1]
        columns_C = torch.arange(best_KC.shape[1], device=best_KC.device)
        is_top_KC = columns_C < self.top_k_K1
        weights_KC = (scores_KC - best_K1).double().exp() * is_top_KC
        reached_KC = weights_KC.cumsum(1)
        total_K1 = (log_total_K1 - best_K1).exp()
        knows_top_K1 = self.top_k_K1 <= best_KC.shape[1]
        share_K1 = self.top_p_K1 * torch.where(knows_top_K1, reached_KC[:, -1:], total_K1)
        num_kept_K1 = (is_top_KC & (reached_KC - weights_KC < share_K1)).sum(1, keepdim=True).clamp_(min=1)
        is_listed_K1 = (self.top_k_K1 < _ALL) | self.top_p_K1.isfinite()
        lowest_K1 = best_KC.gather(1, num_kept_K1 - 1).where(is_listed_K1, NO_TOKEN)
        is_proven_K1 = ~is_listed_K1 | knows_top_K1 | ((self.top_k_K1 == _ALL) & (reached_KC[:, -1:] >= share_K1))
        return lowest_K1.maximum(lowest_sort_keys_of(best_K1 + self.log_min_p_K1)), is_proven_K1[:, 0]


def truncation_thresholds(
    scores_KV: torch.Tensor,
    truncation: Truncation,
    group: StageGroup,
    vocab_rows: Interval,
    vocab_size: int,
    runs_ahead: bool,
    search: VocabularySearch | None,
) -> torch.Tensor:
    """Scores (logits / temperature) of this shard → the lowest sort key that each row keeps [K, 1], on every shard.

    Shards exchange candidates and log-sum-exp. Where these do not prove a row's threshold, its whole vocabulary is
    searched; with `runs_ahead` (see Backend) the host may not know where, and every row is that may need it. `search`:
    the backend's kernel for a shard that has the whole vocabulary, if there is one.
    """
    best_KC = best_of_shard(scores_KV, vocab_rows[0], min(NUM_CANDIDATES, vocab_size))
    # One gather for both: the bits of a float64 fill an int64
    log_total_K1 = scores_KV.logsumexp(1, keepdim=True).double()
    gathered_PKC = group.all_gather(torch.cat([best_KC, log_total_K1.view(torch.int64)], dim=1))
    log_total_K1 = gathered_PKC[:, :, -1:].contiguous().view(torch.float64).logsumexp(0)
    best_KC = best_of_all(gathered_PKC[:, :, :-1], best_KC.shape[1])
    thresholds_K1, is_proven_K = truncation.thresholds(best_KC, log_total_K1)
    if truncation.open_rows_U is None or best_KC.shape[1] == vocab_size:
        return thresholds_K1
    open_rows_U = truncation.open_rows_U if runs_ahead else (~is_proven_K).nonzero()[:, 0]
    widest = -(-vocab_size // group.size)  # the same on all shards, which exchange for each part of the rows
    for rows_U in torch.split(open_rows_U, max(1, SEARCHED_AT_ONCE // widest)) if len(open_rows_U) else ():
        scores_UV, best_U1 = scores_KV.index_select(0, rows_U), scores_of(best_KC[rows_U, :1])
        is_proven_U1 = is_proven_K[rows_U].unsqueeze(1)
        cuts = truncation.top_k_K1[rows_U], truncation.top_p_K1[rows_U]
        found_U1 = search(scores_UV, best_U1, is_proven_U1, *cuts) if search is not None and group.size == 1 else None
        if found_U1 is None:
            vocabulary = Vocabulary(scores_UV, best_U1, vocab_rows[0], group)
            found_U1 = vocabulary.lowest_kept(*cuts, vocab_size, truncation.has_large_top_k)
        found_U1 = found_U1.maximum(lowest_sort_keys_of(best_U1 + truncation.log_min_p_K1[rows_U]))
        thresholds_K1.index_copy_(0, rows_U, torch.where(is_proven_U1, thresholds_K1[rows_U], found_U1))
    return thresholds_K1


def _may_need_more_than_candidates(sampling: SamplingParams) -> bool:
    return sampling.top_k > NUM_CANDIDATES or (sampling.top_p < 1 and not sampling.top_k)


def _is_truncated(row: SamplingRow) -> bool:
    sampling = row.sampling
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
