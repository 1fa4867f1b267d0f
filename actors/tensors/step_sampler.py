"""Draws the ids of a step on the last stage, and keeps account of ids that are on their way to the host."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from actors.tensors.backend import Backend
from actors.tensors.launched import PendingIds, PendingLogprobs, PendingStep
from actors.tensors.sampled_ids import SampledIds
from actors.tensors.sampling.grammar_masks import Grammars, RowGrammar, StepMasks
from actors.tensors.sampling.logits_processors import SamplingRow
from actors.tensors.sampling.logprobs import LogprobReader
from actors.tensors.sampling.sampler import Sampler, SamplingBatch
from actors.tensors.sequence_table import PromptChunk, Row
from actors.words.messages import StepBatch


class StepSampler:
    """Owns the ids that the device has sampled and the host does not know; nothing here waits for the device."""

    def __init__(
        self,
        backend: Backend,
        sampler: Sampler,
        logprobs: LogprobReader,
        sampled_ids: SampledIds,
        grammars: Grammars | None,
    ) -> None:
        """`grammars`: on the last stage."""
        self._backend, self._grammars = backend, grammars
        self._sampler, self._logprobs = sampler, logprobs
        self._sampled_ids = sampled_ids
        self._pending: deque[PendingIds] = deque()
        self._followed: dict[int, RowGrammar] = {}  # by sequence

    def catch_up(self) -> None:
        """Write ids that have reached the host into their rows."""
        while self._pending and self._pending[0].is_ready():
            self._pending.popleft().take()
        while len(self._pending) >= self._sampled_ids.num_positions:  # more steps in flight than the plan says
            self._pending.popleft().take()

    def settle(self) -> None:
        """Wait for all ids that are on their way."""
        while self._pending:
            self._pending.popleft().take()

    def follow_grammars(self, step: StepBatch, rows: Mapping[int, Row]) -> None:
        """Begin what a step needs of grammars, before its forward: compile those of new rows, and make masks."""
        if self._grammars is None:
            return
        for closed in step.closed:
            if (ended := self._followed.pop(closed, None)) is not None:
                self._grammars.close(ended)
        for new in step.opened:
            if new.sampling.grammar is not None:
                followed = self._grammars.open(new.sampling.grammar, new.sampling.stop_ids)
                rows[new.seq].grammar = self._followed[new.seq] = followed
        for entry in step.entries:
            row = rows[entry.seq]
            if entry.sample and row.grammar is not None:
                self._grammars.begin(row.grammar, row.ids[row.num_prompt :])

    def keep(self, rows: Sequence[Row], ids_R: torch.Tensor) -> PendingIds:
        """Append sampled ids (int64 [R], on the device) to their rows; the device knows them until they are here."""
        table_rows, positions = [row.index for row in rows], [len(row.ids) for row in rows]
        download = self._backend.download(ids_R)
        if self._grammars is not None:
            self._grammars.follow([(i, row.grammar) for i, row in enumerate(rows) if row.grammar is not None], download)
        pending = PendingIds(rows, download)
        if pending.is_ready():
            pending.take()
        else:
            places_2R = self._backend.upload(torch.tensor([table_rows, positions], dtype=torch.int64))
            self._sampled_ids.put(places_2R[0], places_2R[1], ids_R.clamp(min=0))  # NOT_A_NUMBER is no id
            self._pending.append(pending)
        return pending

    def sample(
        self,
        sampling: Sequence[SamplingRow],
        rows: Sequence[Row],
        prompts: Sequence[PromptChunk],
        logits_QV: torch.Tensor,
        when_sampled: Callable[[torch.Tensor], None],
    ) -> PendingStep:
        """Draw an id for each of R rows from the first R logits rows; read the log-probabilities that are asked for.

        The other logits rows are of `prompts`. `when_sampled` gets the ids [R] before they are on the host.
        """
        logits_RV = allowed_RV = logits_QV[: len(rows)]
        outcomes: Mapping[int, int] = {}
        if (masks := self._masks(rows)) is not None:
            outcomes = masks.outcomes
            if any(row.sampling.logprobs is not None for row in rows):
                allowed_RV = logits_RV.clone()  # log-probabilities are the model's own
            self._backend.forbid_tokens(allowed_RV, masks.rows, masks.allowed_GB, masks.first_bit)
        batch = SamplingBatch.of(sampling, self._backend.upload, self._sampled_ids, outcomes)
        sampled_ids_R = self._sampler.sample(allowed_RV, batch)
        when_sampled(sampled_ids_R.clamp(min=0))  # after NOT_A_NUMBER too, the next step may already be on its way
        logprobs = self._of_sampled(rows, logits_RV, sampled_ids_R.clamp(min=0))
        of_prompts = self._of_prompts(prompts, logits_QV[len(rows) :])
        return PendingStep(self.keep(rows, sampled_ids_R), logprobs, of_prompts)

    def _masks(self, rows: Sequence[Row]) -> StepMasks | None:
        """The masks of rows with a grammar; None where there are none."""
        of_rows = [(index, row.grammar) for index, row in enumerate(rows) if row.grammar is not None]
        if self._grammars is None or not of_rows:
            return None
        return self._grammars.masks(of_rows, len(rows))

    def _of_sampled(self, rows: Sequence[Row], logits_RV: torch.Tensor, ids_R: torch.Tensor) -> PendingLogprobs | None:
        num_top = {i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs is not None}
        if not num_top:
            return None
        rows_L = self._backend.upload(torch.tensor(list(num_top)))
        asked = logits_RV.index_select(0, rows_L), ids_R.index_select(0, rows_L)
        read = self._logprobs.read(*asked, list(num_top.values()))
        return PendingLogprobs(read, [int(i in num_top) for i in range(len(rows))])

    def _of_prompts(self, prompts: Sequence[PromptChunk], logits_LV: torch.Tensor) -> PendingLogprobs | None:
        if not prompts:
            return None
        ids = [token_id for chunk in prompts for token_id in chunk.ids]
        num_top = [chunk.num_top for chunk in prompts for _ in chunk.ids]
        ids_L = self._backend.upload(torch.tensor(ids, dtype=torch.int64))
        read = self._logprobs.read(logits_LV, ids_L, num_top) if ids else None
        return PendingLogprobs(read, [len(chunk.ids) for chunk in prompts])
