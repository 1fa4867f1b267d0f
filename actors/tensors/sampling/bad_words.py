"""Bad words: the ids that would complete one, judged on the device where the host does not know the ids before.

W words that the next id may complete · P ids of the longest beginning of a word.
"""

from collections.abc import Sequence

import torch

from actors.tensors.backend import Upload
from actors.tensors.sampled_ids import UNKNOWN_ID, SampledIds

BAD_WORD = -1e30  # added to a logit; finite: where nothing else is allowed, the word is written
_ANY_ID = -2  # in a beginning: before its first id


def completed_by(words: Sequence[Sequence[int]], ids: Sequence[int]) -> tuple[list[int], list[Sequence[int]]]:
    """The ids that complete a word after `ids`, and the words of which that depends on an UNKNOWN_ID."""
    completing, open_words = list[int](), list[Sequence[int]]()
    for word in words:
        num_before = len(word) - 1
        if num_before > len(ids) or (num_before and ids[-1] not in (word[-2], UNKNOWN_ID)):
            continue
        tail = ids[len(ids) - num_before :]
        pairs = [(known, asked) for known, asked in zip(tail, word, strict=False) if known != asked]
        if not pairs:
            completing.append(word[-1])
        elif all(known == UNKNOWN_ID for known, _ in pairs):
            open_words.append(word)
    return completing, open_words


def biases_of_open_words(
    found: Sequence[tuple[int, int, Sequence[int], Sequence[int]]], upload: Upload, sampled_ids: SampledIds
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What open words add to logits: rows, ids and biases, each [W], on the device.

    `found`: of each word its row, the row of its sequence in the table, the word, and the ids that it may end.
    """
    longest = max(len(word) - 1 for _, _, word, _ in found)
    padding = [longest - len(word) + 1 for _, _, word, _ in found]
    beginnings = [[_ANY_ID] * more + list(word[:-1]) for more, (_, _, word, _) in zip(padding, found, strict=True)]
    tails = [
        [0] * more + list(ids[len(ids) - longest + more :]) for more, (_, _, _, ids) in zip(padding, found, strict=True)
    ]
    positions = [range(len(ids) - longest, len(ids)) for _, _, _, ids in found]
    beginnings_WP = upload(torch.tensor(beginnings))
    table_rows_N = upload(torch.tensor([table for _, table, _, _ in found]).repeat_interleave(longest))
    positions_N = upload(torch.tensor([list(places) for places in positions]).flatten())
    ids_N = sampled_ids.resolve(upload(torch.tensor(tails).flatten()), table_rows_N, positions_N)
    is_match_W = ((ids_N.view_as(beginnings_WP) == beginnings_WP) | (beginnings_WP == _ANY_ID)).all(1)
    rows_W = upload(torch.tensor([row for row, _, _, _ in found]))
    ids_W = upload(torch.tensor([word[-1] for _, _, word, _ in found]))
    return rows_W, ids_W, is_match_W.float() * BAD_WORD
