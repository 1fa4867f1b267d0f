"""The logits processors: penalties over a sequence's own ids, logit_bias, bad words, allowed ids, min_tokens.

R rows to sample · E of them that are changed · V vocabulary rows of this shard · N ids of all histories · M biases ·
A allowed ids.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from actors.tensors.backend import Upload
from actors.tensors.sampled_ids import UNKNOWN_ID, SampledIds
from actors.tensors.sampling.bad_words import BAD_WORD, BadIds, BadWords, Completing, Ids, bad_ids
from actors.words.messages import SamplingParams


class FixedSampling:
    """What of a sequence's parameters is the same in every step, as arrays: made once."""

    def __init__(self, sampling: SamplingParams) -> None:
        self.bad_words = BadWords(sampling.bad_words) if sampling.bad_words else None
        self.allowed_ids: Ids = np.array(sampling.allowed_ids, np.int64)
        self.bias_ids: Ids = np.array(list(sampling.logit_bias), np.int64)
        self.biases: NDArray[np.float32] = np.array(list(sampling.logit_bias.values()), np.float32)
        self.stop_ids: Ids = np.array(sampling.stop_ids, np.int64)


@dataclass(frozen=True)
class SamplingRow:
    """How the next id of a row is sampled: the parameters, and the ids before it."""

    sampling: SamplingParams
    position: int  # of the id that is sampled
    ids: Sequence[int] = ()  # prompt and generated, before `position`; UNKNOWN_ID where the host does not know one yet
    num_prompt: int = 0  # ids after these are generated
    table_row: int = 0  # of its sequence, by which SampledIds knows the others
    known_fixed: FixedSampling | None = None  # none: made of `sampling` here

    @property
    def has_penalties(self) -> bool:
        """Whether the ids before it change its logits."""
        sampling = self.sampling
        return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0

    @cached_property
    def fixed(self) -> FixedSampling:
        """The parameters as arrays."""
        return self.known_fixed or FixedSampling(self.sampling)

    @property
    def may_not_stop(self) -> bool:
        """Whether it has fewer ids than `min_tokens`."""
        return self.position - self.num_prompt < self.sampling.min_tokens

    @cached_property
    def completing(self) -> Completing | None:
        """The bad words that the next id may complete; None where it has none."""
        found = self.fixed.bad_words and self.fixed.bad_words.after(self.ids)
        return found if found and len(found.ids_W) else None

    @property
    def is_changed(self) -> bool:
        """Whether its logits are not the model's own."""
        sampling = self.sampling
        has_biases = sampling.logit_bias or (self.may_not_stop and sampling.stop_ids)
        return bool(self.has_penalties or sampling.allowed_ids or has_biases or self.completing is not None)


@dataclass(frozen=True)
class History:
    """The ids before the next one, of all rows with penalties, one after the other, on the device."""

    rows_N: torch.Tensor  # int64, among the E
    ids_N: torch.Tensor  # int64
    is_generated_N: torch.Tensor  # float32, 0 or 1


@dataclass(frozen=True)
class AllowedIds:
    """The only ids that may be drawn, of all rows that have such a list, on the device."""

    is_free_E1: torch.Tensor  # bool: the row has none
    rows_A: torch.Tensor  # int64, among the E
    ids_A: torch.Tensor  # int64


@dataclass(frozen=True)
class LogitsProcessors:
    """How E of the R rows are changed, on the device."""

    rows_E: torch.Tensor  # int64
    repetition_E1: torch.Tensor  # float32, as the two below
    presence_E1: torch.Tensor
    frequency_E1: torch.Tensor
    history: History | None
    allowed: AllowedIds | None
    bad: BadIds | None  # rows among the E
    bias_rows_M: torch.Tensor  # int64, among the E
    bias_ids_M: torch.Tensor  # int64
    biases_M: torch.Tensor  # float32

    @classmethod
    def of(
        cls, rows: Sequence[SamplingRow], upload: Upload, sampled_ids: SampledIds | None = None
    ) -> "LogitsProcessors | None":
        """None where no row is changed."""
        indices = [index for index, row in enumerate(rows) if row.is_changed]
        if not indices:
            return None
        changed = [rows[index] for index in indices]
        sampling = [row.sampling for row in changed]
        on_host = (
            torch.tensor(indices),
            torch.tensor([[params.repetition_penalty] for params in sampling], dtype=torch.float32),
            torch.tensor([[params.presence_penalty] for params in sampling], dtype=torch.float32),
            torch.tensor([[params.frequency_penalty] for params in sampling], dtype=torch.float32),
        )
        rows_E, repetition, presence, frequency = map(upload, on_host)
        history, allowed = _history(changed, upload, sampled_ids), _allowed(changed, upload)
        completing = [(index, row.table_row, row.completing) for index, row in enumerate(changed)]
        bad = bad_ids([(index, table, one) for index, table, one in completing if one], upload, sampled_ids)
        return cls(rows_E, repetition, presence, frequency, history, allowed, bad, *_biases(changed, upload))

    def apply(self, logits_RV: torch.Tensor, first_id: int) -> torch.Tensor:
        """Float32 logits [R, V] of the vocabulary from `first_id` on → a changed copy."""
        logits_EV = logits_RV.index_select(0, self.rows_E)
        num_ids = logits_EV.shape[1]
        if self.history is not None:
            rows_N, ids_N = self.history.rows_N, self.history.ids_N
            num_rows = len(self.rows_E)
            seen_EV = _scatter_add(
                rows_N, ids_N, torch.ones_like(self.history.is_generated_N), num_rows, first_id, num_ids
            )
            generated_EV = _scatter_add(rows_N, ids_N, self.history.is_generated_N, num_rows, first_id, num_ids)
            repeated_EV = torch.where(logits_EV > 0, logits_EV / self.repetition_E1, logits_EV * self.repetition_E1)
            logits_EV = torch.where(seen_EV > 0, repeated_EV, logits_EV)
            logits_EV -= self.presence_E1 * (generated_EV > 0) + self.frequency_E1 * generated_EV
        if len(self.biases_M):
            logits_EV += _scatter_add(
                self.bias_rows_M, self.bias_ids_M, self.biases_M, len(self.rows_E), first_id, num_ids
            )
        if self.bad is not None:  # a word may be found twice, and an id complete several
            bad = self.bad.rows_W, self.bad.ids_W, self.bad.is_bad_W
            num_bad_EV = _scatter_add(*bad, len(self.rows_E), first_id, num_ids)
            logits_EV = torch.where(num_bad_EV > 0, logits_EV.clamp(max=BAD_WORD), logits_EV)
        if self.allowed is not None:
            rows_A, ids_A = self.allowed.rows_A, self.allowed.ids_A
            ones_A = torch.ones_like(ids_A, dtype=torch.float32)
            num_allowed_EV = _scatter_add(rows_A, ids_A, ones_A, len(self.rows_E), first_id, num_ids)
            logits_EV = logits_EV.masked_fill((num_allowed_EV == 0) & ~self.allowed.is_free_E1, float("-inf"))
        return logits_RV.index_copy(0, self.rows_E, logits_EV)


def _allowed(changed: list[SamplingRow], upload: Upload) -> AllowedIds | None:
    allowed = [row.fixed.allowed_ids for row in changed]
    lengths = torch.tensor([len(ids) for ids in allowed])
    if not lengths.any():
        return None
    rows_A = torch.repeat_interleave(torch.arange(len(changed)), lengths)
    ids_A = torch.from_numpy(np.concatenate(allowed))
    return AllowedIds(upload((lengths == 0)[:, None]), upload(rows_A), upload(ids_A))


def _biases(changed: list[SamplingRow], upload: Upload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is added to the logits: rows among the E, ids and biases, on the device."""
    stops = [row.fixed.stop_ids if row.may_not_stop else row.fixed.stop_ids[:0] for row in changed]
    ids = [row.fixed.bias_ids for row in changed] + stops
    biases = [row.fixed.biases for row in changed] + [np.full(len(one), -np.inf, np.float32) for one in stops]
    rows_M = np.repeat([*range(len(changed))] * 2, [len(one) for one in ids])
    on_host = (
        torch.from_numpy(rows_M),
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.concatenate(biases)),
    )
    return upload(on_host[0]), upload(on_host[1]), upload(on_host[2])


def _history(changed: list[SamplingRow], upload: Upload, sampled_ids: SampledIds | None) -> History | None:
    flat = array("q")
    for row in changed:
        if row.has_penalties:
            flat.extend(row.ids)
    if not flat:
        return None
    lengths = torch.tensor([len(row.ids) if row.has_penalties else 0 for row in changed])
    rows_N = torch.repeat_interleave(torch.arange(len(changed)), lengths)
    positions_N = torch.arange(len(flat)) - (lengths.cumsum(0) - lengths)[rows_N]
    is_generated_N = positions_N >= torch.tensor([row.num_prompt for row in changed])[rows_N]
    ids_N = upload(torch.frombuffer(flat, dtype=torch.int64).clone())
    if UNKNOWN_ID in flat:
        assert sampled_ids is not None, "an id is not known on the host"
        table_rows_N = torch.tensor([row.table_row for row in changed])[rows_N]
        ids_N = sampled_ids.resolve(ids_N, upload(table_rows_N), upload(positions_N))
    return History(upload(rows_N), ids_N, upload(is_generated_N.float()))


def _scatter_add(
    rows_N: torch.Tensor, ids_N: torch.Tensor, values_N: torch.Tensor, num_rows: int, first_id: int, num_ids: int
) -> torch.Tensor:
    """Sum values by (row, id) → [rows, ids of this shard]; other shards' ids go to a last column, which is dropped."""
    columns_N = ids_N - first_id
    columns_N = columns_N.masked_fill_((columns_N < 0) | (columns_N >= num_ids), num_ids)
    sums = torch.zeros(num_rows * (num_ids + 1), dtype=values_N.dtype, device=values_N.device)
    sums.index_add_(0, rows_N * (num_ids + 1) + columns_N, values_N)
    return sums.view(num_rows, num_ids + 1)[:, :num_ids]
