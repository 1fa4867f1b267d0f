"""The sequence table: a row per open sequence (ids, blocks, sampling); it turns steps into tensors.

T tokens of the step · R rows to sample · Q logits rows. Tokens are laid out with single-token entries first, by
length, so that rows of similar length are attended together; sampled ids go back in the order of the entries.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from actors.decisions.schedule.blocks import num_blocks_for
from actors.tensors.attention.metadata import AttentionMetadata, Chunk, StepLayout, positions_of
from actors.tensors.backend import AttentionBackend, StaleBlocks, StepInputs, Upload
from actors.tensors.sampled_ids import UNKNOWN_ID, SampledIds
from actors.tensors.sampling.grammar_masks import RowGrammar
from actors.tensors.sampling.logits_processors import FixedSampling, SamplingRow
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch

_INITIAL_ROWS = 8


def max_table_rows(max_num_seqs: int) -> int:
    """The most rows that the table ever has with `max_num_seqs` sequences open at a time: it doubles when full."""
    return 2 * max(_INITIAL_ROWS, max_num_seqs)


def in_token_order(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of a step as their tokens are laid out: single tokens first, by length, then chunks of prompts."""
    return sorted(entries, key=lambda entry: (len(entry.ids) > 1, entry.start if len(entry.ids) <= 1 else 0))


@dataclass
class Row:
    """What a rank remembers of a sequence."""

    index: int  # in the block tables
    sampling: SamplingParams
    ids: "array[int]"  # prompt and generated, as far as this rank knows them; UNKNOWN_ID where one is on its way
    num_prompt: int
    num_blocks: int = 0
    num_blocks_on_device: int = 0  # that StepInputs have brought there
    grammar: RowGrammar | None = None  # on the last stage, where the sequence has one

    @cached_property
    def fixed_sampling(self) -> FixedSampling:
        """The parameters as arrays, which all steps share."""
        return FixedSampling(self.sampling)


@dataclass(frozen=True)
class PromptChunk:
    """Prompt ids whose log-probabilities are wanted, one a row of logits: the row of the id before it."""

    ids: list[int]
    num_top: int


@dataclass(frozen=True)
class StepTensors:
    """The inputs of one step, on the device."""

    ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    attention: AttentionMetadata
    logits_rows_Q: torch.Tensor  # int64, among the tokens: the R that are sampled from, then those of `prompts`
    sampled: tuple[Row, ...]  # one a sampling entry, in entry order
    prompts: tuple["PromptChunk", ...]  # one an entry that wants them, in entry order


class SequenceTable:
    """The rows of all open sequences; each step brings only what changes."""

    def __init__(
        self,
        blocks_per_sequence: int,
        block_size: int,
        attention: AttentionBackend,
        upload: Upload,
        sampled_ids: SampledIds,
        knows_samples: bool = True,
    ) -> None:
        """`knows_samples`: whether this rank learns the sampled ids; the middle stages do not, and need no ids."""
        self._sampled_ids = sampled_ids
        self.knows_samples = knows_samples
        self.block_size = block_size
        self._attention = attention
        self._upload = upload
        self.rows: dict[int, Row] = {}
        self._tables = torch.zeros(_INITIAL_ROWS, blocks_per_sequence, dtype=torch.int64)  # on the host
        self._free = list(range(_INITIAL_ROWS))

    def apply(self, step: StepBatch) -> list[int]:
        """Drop closed rows, open new ones, add the ids and blocks of the entries.

        Returns the fresh blocks, which hold nothing of their sequence yet (those of a reused prefix do).
        """
        for seq in step.closed:
            self._free.append(self.rows.pop(seq).index)
        for new in step.opened:
            self._open(new)
        return [block for entry in step.entries for block in self._extend(entry)]

    def tensors(self, step: StepBatch) -> StepTensors:
        """The input tensors of a step that has entries; `apply` was called for it before."""
        ids, chunks, logits_rows = self._tokens(step)
        first_token = {entry.seq: chunk.row for entry, chunk in zip(in_token_order(step.entries), chunks, strict=True)}
        prompts = []
        for entry in step.entries:
            if entry.prompt_logprobs:
                prompts.append(self._prompt_chunk(entry))
                first = first_token[entry.seq]
                logits_rows += range(first, first + len(prompts[-1].ids))
        positions_T = self._upload(torch.from_numpy(positions_of(chunks)))
        return StepTensors(
            ids_T=self._ids_on_device(ids, chunks, positions_T),
            positions_T=positions_T,
            attention=self._attention.plan(StepLayout(chunks, self._tables, logits_rows)),
            logits_rows_Q=self._upload(torch.tensor(logits_rows, dtype=torch.int64)),
            sampled=tuple(self.rows[entry.seq] for entry in step.entries if entry.sample),
            prompts=tuple(prompts),
        )

    def inputs(self, step: StepBatch) -> StepInputs:
        """The same for a step that runs over static buffers. Blocks are told once; the caller brings them there."""
        stale = []
        for entry in step.entries:
            row = self.rows[entry.seq]
            if row.num_blocks > row.num_blocks_on_device:
                stale.append(StaleBlocks(row.index, row.num_blocks_on_device, row.num_blocks))
                row.num_blocks_on_device = row.num_blocks
        return StepInputs(*self._tokens(step), self._tables, stale)

    def _tokens(self, step: StepBatch) -> tuple["array[int]", list[Chunk], list[int]]:
        """The ids of a step's entries, where each entry's are, and the tokens that are sampled after, in entry order.

        Every rank lays out a step's tokens alike, whichever way it computes them: stages exchange them by their index.
        """
        ids, chunks, last_token = array("q"), list[Chunk](), dict[int, int]()
        for entry in in_token_order(step.entries):
            row, num_ids = self.rows[entry.seq], max(1, len(entry.ids))
            chunks.append(Chunk(row.index, len(ids), entry.start, num_ids))
            ids += row.ids[entry.start : entry.start + num_ids]
            last_token[entry.seq] = len(ids) - 1
        return ids, chunks, [last_token[entry.seq] for entry in step.entries if entry.sample]

    def _ids_on_device(self, ids: "array[int]", chunks: list[Chunk], positions_T: torch.Tensor) -> torch.Tensor:
        ids_T = self._upload(torch.frombuffer(ids, dtype=torch.int64).clone())
        if UNKNOWN_ID not in ids:
            return ids_T
        counts = torch.tensor([chunk.num_tokens for chunk in chunks])
        table_rows_T = torch.tensor([chunk.table for chunk in chunks]).repeat_interleave(counts)
        return self._sampled_ids.resolve(ids_T, self._upload(table_rows_T), positions_T)

    def sampling_rows(self, step: StepBatch) -> list[SamplingRow]:
        """The SamplingRow of each of a step's entries that sample, in entry order."""
        return [self.sampling_row(entry) for entry in step.entries if entry.sample]

    def sampling_row(self, entry: Entry) -> SamplingRow:
        """The SamplingRow of one entry."""
        row = self.rows[entry.seq]
        position = entry.start + max(1, len(entry.ids))
        return SamplingRow(row.sampling, position, row.ids, row.num_prompt, row.index, row.fixed_sampling)

    def _prompt_chunk(self, entry: Entry) -> PromptChunk:
        """The id after each of an entry's ids, as far as it is of the prompt (a replayed sequence has more ids)."""
        row = self.rows[entry.seq]
        following = entry.ids[1:] + ([] if entry.next_prompt_id is None else [entry.next_prompt_id])
        num_top = row.sampling.prompt_logprobs
        assert num_top is not None, f"sequence {entry.seq} asked for no prompt logprobs"
        return PromptChunk(following[: max(0, row.num_prompt - entry.start - 1)], num_top)

    def _open(self, new: NewSequence) -> None:
        assert new.seq not in self.rows, f"sequence {new.seq} is open already"
        if not self._free:
            self._free = list(range(len(self._tables), 2 * len(self._tables)))
            self._tables = torch.cat([self._tables, torch.zeros_like(self._tables)])
        self.rows[new.seq] = Row(self._free.pop(), new.sampling, array("q", new.known_ids), new.num_prompt)

    def _extend(self, entry: Entry) -> list[int]:
        row = self.rows[entry.seq]
        if entry.ids:
            assert entry.start <= len(row.ids), f"sequence {entry.seq}: ids before position {entry.start} are missing"
            row.ids[entry.start :] = array("q", entry.ids)
        elif not self.knows_samples:
            row.ids[entry.start :] = array("q", [0])
        else:
            assert entry.start == len(row.ids) - 1, (
                f"sequence {entry.seq}: its last token at {entry.start} is not known to this rank"
            )
        first, end = row.num_blocks, row.num_blocks + len(entry.new_blocks)
        if entry.new_blocks:
            self._tables[row.index, first:end] = torch.tensor(entry.new_blocks)
            row.num_blocks = end
        assert entry.start + max(1, len(entry.ids)) <= row.num_blocks * self.block_size, (
            f"sequence {entry.seq}: {row.num_blocks} blocks do not hold its ids"
        )
        reused = num_blocks_for(entry.start, self.block_size)  # blocks that hold positions before `start`
        return entry.new_blocks[max(0, reused - first) :]
