"""Bad words: the ids that would complete one, judged on the device where the host does not know the ids before.

E rows with bad words · W words that the next id may complete · P ids of the longest beginning of a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from actors.tensors.backend import Upload
from actors.tensors.sampled_ids import UNKNOWN_ID, SampledIds

BAD_WORD = -1e30  # the most that a logit then is; finite: where nothing else is allowed, the word is written
_ANY_ID = -2  # in a beginning: before its first id
_NO_ID = -3  # in the end of a sequence: before its first id

Ids = NDArray[np.int64]


class Completing(NamedTuple):
    """The words that the next id of a row may complete: for certain where the row's end has no UNKNOWN_ID."""

    beginnings_WP: Ids
    ids_W: Ids  # that complete them
    end_P: Ids  # of the row's ids
    num_ids: int  # of the row


class BadWords:
    """The bad words of a sequence, which are the same in every step."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        longest = max((len(word) - 1 for word in words), default=0)
        self._beginnings_WP = np.full((len(words), longest), _ANY_ID, np.int64)
        for index, word in enumerate(words):
            self._beginnings_WP[index, longest - len(word) + 1 :] = word[:-1]
        self._ids_W = np.array([word[-1] for word in words], np.int64)

    def after(self, ids: Sequence[int]) -> Completing:
        """The words whose beginning `ids` end with, as far as they are known."""
        end_P = _end_of(ids, self._beginnings_WP.shape[1])
        is_match_WP = (self._beginnings_WP == end_P) | (self._beginnings_WP == _ANY_ID) | (end_P == UNKNOWN_ID)
        is_match_W = is_match_WP.all(1)
        return Completing(self._beginnings_WP[is_match_W], self._ids_W[is_match_W], end_P, len(ids))


def _end_of(ids: Sequence[int], length: int) -> Ids:
    known = ids[max(0, len(ids) - length) :]
    end_P = np.full(length, _NO_ID, np.int64)
    end_P[length - len(known) :] = known
    return end_P


@dataclass(frozen=True)
class BadIds:
    """The ids that would complete a word, on the device."""

    rows_W: torch.Tensor  # int64
    ids_W: torch.Tensor  # int64
    is_bad_W: torch.Tensor  # float32, 0 or 1


def bad_ids(
    found: Sequence[tuple[int, int, Completing]], upload: Upload, sampled_ids: SampledIds | None
) -> BadIds | None:
    """What is forbidden in a step. `found`: of each row its number, its row in the table, and what may be completed."""
    if not found:
        return None
    counts_E = [len(one.ids_W) for _, _, one in found]
    rows_W = upload(torch.from_numpy(np.repeat([row for row, _, _ in found], counts_E)))
    ids_W = upload(torch.from_numpy(np.concatenate([one.ids_W for _, _, one in found])))
    if not any(UNKNOWN_ID in one.end_P for _, _, one in found):
        return BadIds(rows_W, ids_W, torch.ones_like(ids_W, dtype=torch.float32))
    assert sampled_ids is not None, "an id is not known on the host"
    longest = max(len(one.end_P) for _, _, one in found)
    ends_EP = torch.from_numpy(np.stack([_padded(one.end_P, longest, _NO_ID) for _, _, one in found]))
    all_beginnings = np.concatenate([_padded(one.beginnings_WP, longest, _ANY_ID) for _, _, one in found])
    beginnings_WP = upload(torch.from_numpy(all_beginnings))
    positions_EP = torch.tensor([[one.num_ids - longest] for _, _, one in found]) + torch.arange(longest)
    table_rows_EP = torch.tensor([[table_row] for _, table_row, _ in found]).expand(-1, longest)
    ends_N = sampled_ids.resolve(*(upload(one.flatten()) for one in (ends_EP, table_rows_EP, positions_EP)))
    owner_W = upload(torch.from_numpy(np.repeat(np.arange(len(found)), counts_E)))
    ends_WP = ends_N.view_as(ends_EP)[owner_W]
    is_bad_W = ((ends_WP == beginnings_WP) | (beginnings_WP == _ANY_ID)).all(1)
    return BadIds(rows_W, ids_W, is_bad_W.float())


def _padded(ids: Ids, length: int, filler: int) -> Ids:
    """To so many in the last dimension, at its beginning."""
    if ids.shape[-1] == length:
        return ids
    more = [(0, 0)] * (ids.ndim - 1) + [(length - ids.shape[-1], 0)]
    return np.pad(ids, more, constant_values=filler)
