"""A token's sort_key, (score, lowest id) in one int64: all shards compare alike, and no tie is left open.

R rows · V vocabulary rows of this shard · C best of them.
"""

import torch

_ID_BITS = 32
_LAST_ID = (1 << _ID_BITS) - 1
MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign
_ROWS_AT_ONCE = 16  # sort_keys take twice the memory of their scores
NOTHING = -0x7F800001 << _ID_BITS  # as low as the score -inf, and below every token that has it


def sort_keys_of(scores: torch.Tensor, ids: torch.Tensor | int) -> torch.Tensor:
    """Float32 scores [*] of tokens (int64 ids, broadcast, or one for all) → int64 [*]: higher is better.

    Of equal scores the lower id is.

    The bits of a positive float32 ascend as its value does, those of a negative one descend: these are turned over.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    ascending = bits ^ ((bits >> 31) & MAGNITUDE)
    return (ascending.long() << _ID_BITS) + (_LAST_ID - ids)


def scores_of(sort_keys: torch.Tensor) -> torch.Tensor:
    """Int64 [*] → the float32 scores in them."""
    ascending = (sort_keys >> _ID_BITS).int()
    return (ascending ^ ((ascending >> 31) & MAGNITUDE)).view(torch.float32)


def ids_of(sort_keys: torch.Tensor) -> torch.Tensor:
    """Int64 [*] → the token ids in them."""
    return _LAST_ID - (sort_keys & _LAST_ID)


def lowest_key_with(scores: torch.Tensor) -> torch.Tensor:
    """Float32 [*] → the sort_key that no token of this score falls below."""
    return sort_keys_of(scores, _LAST_ID)


def best_of_shard(scores_RV: torch.Tensor, first_id: int, count: int) -> torch.Tensor:
    """The `count` best sort_keys of each row [R, C], best first; NOTHING where the shard has fewer tokens."""
    num_rows, num_ids = scores_RV.shape
    best_RC = torch.full((num_rows, count), NOTHING, dtype=torch.int64, device=scores_RV.device)
    here = min(count, num_ids)
    if here:
        ids_V = torch.arange(first_id, first_id + num_ids, device=scores_RV.device)
        for row in range(0, num_rows, _ROWS_AT_ONCE):
            rows = slice(row, row + _ROWS_AT_ONCE)
            best_RC[rows, :here] = sort_keys_of(scores_RV[rows], ids_V).topk(here, dim=1).values
    return best_RC


def best_of_all(sort_keys_PRC: torch.Tensor, count: int) -> torch.Tensor:
    """What P shards gathered → the `count` best of each row [R, count], best first."""
    return sort_keys_PRC.transpose(0, 1).flatten(1).topk(count, dim=1).values
