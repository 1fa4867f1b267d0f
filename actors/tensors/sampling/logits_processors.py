"""The logits processors: penalties over a sequence's own ids, logit_bias, bad words, allowed ids, min_tokens.

R rows to sample · E of them that are changed · V vocabulary rows of this shard · N ids of all histories · M biases ·
A allowed ids.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from actors.tensors.backend import Upload
from actors.tensors.sampled_ids import UNKNOWN_ID, SampledIds
from actors.tensors.sampling.bad_words import BAD_WORD, biases_of_open_words, completed_by
from actors.words.messages import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """How the next id of a row is sampled: the parameters, and the ids before it."""

    sampling: SamplingParams
    position: int  # of the id that is sampled
    ids: Sequence[int] = ()  # prompt and generated, before `position`; UNKNOWN_ID where the host does not know one yet
    num_prompt: int = 0  # ids after these are generated
    table_row: int = 0  # of its sequence, by which SampledIds knows the others

    @property
    def has_penalties(self) -> bool:
        """Whether the ids before it change its logits."""
        sampling = self.sampling
        return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the logits, by id; ids may lie outside the vocabulary. Without what `open_words` may add."""
        sampling = self.sampling
        biases = sampling.logit_bias
        if sampling.bad_words:
            biases = biases | dict.fromkeys(self._bad_words[0], BAD_WORD)
        if self.position - self.num_prompt < sampling.min_tokens:
            biases = biases | dict.fromkeys(sampling.stop_ids, float("-inf"))
        return biases

    @property
    def open_words(self) -> list[Sequence[int]]:
        """The bad words that the next id may complete, if ids that only the device knows are their beginning."""
        return self._bad_words[1]

    @cached_property
    def _bad_words(self) -> tuple[list[int], list[Sequence[int]]]:
        return completed_by(self.sampling.bad_words, self.ids)

    @property
    def is_changed(self) -> bool:
        """Whether its logits are not the model's own."""
        return bool(self.has_penalties or self.sampling.allowed_ids or self.biases or self.open_words)


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
        biases = _biases(changed, upload, sampled_ids)
        return cls(rows_E, repetition, presence, frequency, history, allowed, *biases)

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
        if self.allowed is not None:
            rows_A, ids_A = self.allowed.rows_A, self.allowed.ids_A
            ones_A = torch.ones_like(ids_A, dtype=torch.float32)
            num_allowed_EV = _scatter_add(rows_A, ids_A, ones_A, len(self.rows_E), first_id, num_ids)
            logits_EV = logits_EV.masked_fill((num_allowed_EV == 0) & ~self.allowed.is_free_E1, float("-inf"))
        return logits_RV.index_copy(0, self.rows_E, logits_EV)


def _allowed(changed: list[SamplingRow], upload: Upload) -> AllowedIds | None:
    flat = array("q")
    for row in changed:
        flat.extend(row.sampling.allowed_ids)
    if not flat:
        return None
    lengths = torch.tensor([len(row.sampling.allowed_ids) for row in changed])
    rows_A = torch.repeat_interleave(torch.arange(len(changed)), lengths)
    ids_A = torch.frombuffer(flat, dtype=torch.int64).clone()
    return AllowedIds(upload((lengths == 0)[:, None]), upload(rows_A), upload(ids_A))


def _biases(
    changed: list[SamplingRow], upload: Upload, sampled_ids: SampledIds | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is added to the logits: rows among the E, ids and biases, on the device."""
    biases = [(index, *bias) for index, row in enumerate(changed) for bias in row.biases.items()]
    tensors = (
        upload(torch.tensor([index for index, _, _ in biases], dtype=torch.int64)),
        upload(torch.tensor([token_id for _, token_id, _ in biases], dtype=torch.int64)),
        upload(torch.tensor([bias for _, _, bias in biases], dtype=torch.float32)),
    )
    found = [(index, row.table_row, word, row.ids) for index, row in enumerate(changed) for word in row.open_words]
    if not found:
        return tensors
    assert sampled_ids is not None, "an id is not known on the host"
    of_words = biases_of_open_words(found, upload, sampled_ids)
    rows_M, ids_M, biases_M = (torch.cat(pair) for pair in zip(tensors, of_words, strict=True))
    return rows_M, ids_M, biases_M


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
