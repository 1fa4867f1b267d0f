"""Finds thresholds of top_k and top_p in the whole vocabulary: by counting, without sorting, gathering it or waiting.

The bits of scores are searched from the highest on, some at a time: each shard adds up what the tokens weigh by those
bits, and the sums over the shards say in which group of tokens the threshold lies. Weights are integers, so that sums
have the same bits in any order and on any number of shards.

U rows · V vocabulary rows of this shard · B values of some bits of a score · P shards.
"""

import torch

from actors.tensors.sampling.ranking import MAGNITUDE, NO_TOKEN, sort_keys_of
from cluster.collectives.interface import StageGroup

_SCORE_BITS = 32
_SEARCHED_BITS = (11, 11, 10)  # together the bits of a score
WEIGHT_BITS = 44  # of the weight of the best token; 2^18 tokens of this weight fit into an int64


class Vocabulary:
    """The scores of some rows, and what is exchanged about them. All shards call it with the same rows."""

    def __init__(self, scores_UV: torch.Tensor, best_U1: torch.Tensor, first_id: int, group: StageGroup) -> None:
        """Scores (float32) of this shard's tokens from `first_id` on; the best score of each row in all shards."""
        bits = (scores_UV + 0.0).view(torch.int32)
        ascending = bits ^ ((bits >> 31) & MAGNITUDE)  # as in sort_keys_of
        self._bits_UV = ascending.long() + (1 << (_SCORE_BITS - 1))
        weights = (scores_UV - best_U1).double().exp().nan_to_num(0.0, 0.0, 0.0).clamp_(max=1.0)
        self._weights_UV = weights.mul_(1 << WEIGHT_BITS).long()
        self._ids_V = torch.arange(first_id, first_id + scores_UV.shape[1], device=scores_UV.device)
        self._group = group

    def lowest_kept(
        self, top_k_U1: torch.Tensor, top_p_U1: torch.Tensor, vocab_size: int, has_top_k: bool
    ) -> torch.Tensor:
        """The sort key of the worst token that each row keeps [U, 1]; NO_TOKEN where it keeps all.

        top_k (int64) is above `vocab_size`, and top_p (float64) infinite, where they are not used. With `has_top_k`
        some row uses it.
        """
        weights_UV, lowest_U1 = self._weights_UV, torch.full_like(top_k_U1, NO_TOKEN)
        if has_top_k:
            tokens_UV = torch.ones_like(weights_UV)
            found_U1, is_kept_UV = self._reach(tokens_UV, top_k_U1.clamp(max=vocab_size))
            lowest_U1 = torch.where(top_k_U1 < vocab_size, found_U1, lowest_U1)
            weights_UV = weights_UV * is_kept_UV
        total_U1 = self._over_shards(weights_UV.sum(1, keepdim=True))
        share_U1 = (total_U1 * top_p_U1.clamp(max=1.0)).ceil().long().minimum(total_U1).clamp_(min=1)
        found_U1, _ = self._reach(weights_UV, share_U1)
        return torch.where(top_p_U1.isfinite(), found_U1, lowest_U1)

    def _reach(self, weights_UV: torch.Tensor, share_U1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sort key [U, 1] of the token with which the best ones weigh `share`; which tokens are at least as good.

        Of equal scores the lower id is the better token.
        """
        prefix_U1 = torch.zeros_like(share_U1)
        before_U1 = torch.zeros_like(share_U1)  # what tokens weigh that are better than all with this prefix
        left = _SCORE_BITS
        for num_bits in _SEARCHED_BITS:
            is_here_UV = (self._bits_UV >> left) == prefix_U1
            left -= num_bits
            digits_UV = (self._bits_UV >> left) & ((1 << num_bits) - 1)
            sums_UB = share_U1.new_zeros(len(share_U1), 1 << num_bits)
            sums_UB = self._over_shards(sums_UB.scatter_add_(1, digits_UV, weights_UV * is_here_UV)).flip(1)
            reached_UB = before_U1 + sums_UB.cumsum(1)
            index_U1 = (reached_UB < share_U1).sum(1, keepdim=True).clamp_(max=(1 << num_bits) - 1)
            before_U1 = (reached_UB - sums_UB).gather(1, index_U1)
            prefix_U1 = (prefix_U1 << num_bits) + (1 << num_bits) - 1 - index_U1
        is_equal_UV = (self._bits_UV == prefix_U1) & (weights_UV > 0)
        counts_PU2 = self._group.all_gather(torch.stack([is_equal_UV.sum(1), (weights_UV * is_equal_UV).sum(1)], 1))
        num_equal_U, weight_U = counts_PU2.sum(0).clamp_(min=1).unbind(1)
        each_U1 = (weight_U // num_equal_U).clamp_(min=1).unsqueeze(1)
        rank_U1 = (share_U1 - before_U1 + each_U1 - 1) // each_U1  # among equal ones, from 1 on
        num_before_U1 = counts_PU2[: self._group.shard, :, :1].sum(0)
        ranks_UV = is_equal_UV.cumsum(1) + num_before_U1
        is_last_UV = is_equal_UV & (ranks_UV == rank_U1)
        last_id_U1 = self._over_shards((is_last_UV * self._ids_V).sum(1, keepdim=True))
        is_kept_UV = (self._bits_UV > prefix_U1) | ((self._bits_UV == prefix_U1) & (self._ids_V <= last_id_U1))
        scores_U1 = _scores_of(prefix_U1)
        return sort_keys_of(scores_U1, last_id_U1), is_kept_UV

    def _over_shards(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over all shards."""
        return self._group.all_gather(numbers).sum(0)


def _scores_of(bits_U1: torch.Tensor) -> torch.Tensor:
    """The scores (float32) with these bits."""
    ascending = (bits_U1 - (1 << (_SCORE_BITS - 1))).int()
    return (ascending ^ ((ascending >> 31) & MAGNITUDE)).view(torch.float32)
