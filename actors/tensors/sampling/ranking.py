"""A token's sort key, its score and id in one int64: all shards compare tokens alike, and no two are equal.

R rows · V vocabulary rows of this shard · C best tokens · P shards.
"""

import torch

_ID_BITS = 32
_LAST_ID = (1 << _ID_BITS) - 1
MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but the sign
_ROWS_AT_ONCE = 16  # sort keys take twice the memory of their scores
NO_TOKEN = -0x7F800001 << _ID_BITS  # the score -inf, but below the sort key of every token with that score


def sort_keys_of(scores: torch.Tensor, ids: torch.Tensor | int) -> torch.Tensor:
    """Float32 scores [*] of tokens (int64 ids, broadcast, or one id for all) → int64 [*], higher for better tokens.

    Of equal scores the lower id has the higher key. The bits of a positive float32, as an integer, grow with its value;
    those of a negative one shrink, and are inverted.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    ascending = bits ^ ((bits >> 31) & MAGNITUDE)
    return (ascending.long() << _ID_BITS) + (_LAST_ID - ids)


def scores_of(sort_keys: torch.Tensor) -> torch.Tensor:
    """Sort keys [*] → their scores, float32."""
    ascending = (sort_keys >> _ID_BITS).int()
    return (ascending ^ ((ascending >> 31) & MAGNITUDE)).view(torch.float32)


def ids_of(sort_keys: torch.Tensor) -> torch.Tensor:
    """Sort keys [*] → their token ids, int64."""
    return _LAST_ID - (sort_keys & _LAST_ID)


def lowest_sort_keys_of(scores: torch.Tensor) -> torch.Tensor:
    """Float32 scores [*] → the lowest sort keys that tokens of these scores can have."""
    return sort_keys_of(scores, _LAST_ID)


def best_of_shard(scores_RV: torch.Tensor, first_id: int, count: int) -> torch.Tensor:
    """The `count` best sort keys of each row [R, C], best first, padded with NO_TOKEN."""
    num_rows, num_ids = scores_RV.shape
    best_RC = torch.full((num_rows, count), NO_TOKEN, dtype=torch.int64, device=scores_RV.device)
    num_found = min(count, num_ids)
    if num_found:
        ids_V = torch.arange(first_id, first_id + num_ids, device=scores_RV.device)
        for row in range(0, num_rows, _ROWS_AT_ONCE):
            rows = slice(row, row + _ROWS_AT_ONCE)
            best_RC[rows, :num_found] = sort_keys_of(scores_RV[rows], ids_V).topk(num_found, dim=1).values
    return best_RC


def best_of_all(sort_keys_PRC: torch.Tensor, count: int) -> torch.Tensor:
    """The best sort keys of each shard, gathered [P, R, C] → the `count` best of each row [R, count], best first."""
    return sort_keys_PRC.transpose(0, 1).flatten(1).topk(count, dim=1).values
