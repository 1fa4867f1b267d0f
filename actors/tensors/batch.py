"""Turns step batches, which are differences, into tensors: owns a row per sequence (ids, blocks, sampling).

T tokens of the step · R rows to sample. Tokens are laid out with single-token entries first, by length, so that similar
ones are attended together; what is sampled goes back in the order of the entries.
"""

from dataclasses import dataclass

import torch

from actors.tensors.attention import StepAttention
from actors.tensors.sampler import Draws
from actors.tensors.visibility import Chunk, VisibilityMaker
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch

_ROWS_AT_FIRST = 8


@dataclass
class Row:
    """What a rank remembers of a sequence."""

    index: int  # in the block tables
    sampling: SamplingParams
    ids: list[int]  # prompt and generated, as far as this rank knows them
    num_blocks: int = 0


@dataclass(frozen=True)
class StepTensors:
    """One step, on the device."""

    ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    attention: StepAttention
    sampled_seqs: tuple[int, ...]  # one a sampling entry, in entry order
    sampled_rows_R: torch.Tensor  # int64: each one's last token
    draws: Draws


class SequenceTable:
    """The rows of all open sequences, changed by differences."""

    def __init__(self, blocks_per_sequence: int, block_size: int, visibility: VisibilityMaker) -> None:
        self.block_size = block_size
        self.visibility = visibility
        self.device = visibility.device
        self.rows: dict[int, Row] = {}
        self._tables = torch.zeros(_ROWS_AT_FIRST, blocks_per_sequence, dtype=torch.int64)  # on the host
        self._free = list(range(_ROWS_AT_FIRST))

    def apply(self, step: StepBatch) -> list[int]:
        """Drop closed rows, open new ones, add what the entries bring.

        Returns the blocks that are fresh: nothing of their sequence is in them yet (those of a reused prefix are not).
        """
        for seq in step.closed:
            self._free.append(self.rows.pop(seq).index)
        for new in step.opened:
            self._open(new)
        return [block for entry in step.entries for block in self._extend(entry)]

    def append_sampled(self, seqs: tuple[int, ...], ids: list[int]) -> None:
        """Remember what was sampled: an entry without ids means the last one of these."""
        for seq, token_id in zip(seqs, ids, strict=True):
            self.rows[seq].ids.append(token_id)

    def tensors(self, step: StepBatch) -> StepTensors:
        """The tensors of a step that has entries; `apply` came before."""
        ids: list[int] = []
        chunks: list[Chunk] = []
        last_token: dict[int, int] = {}  # by sequence: the place of its last id among the tokens
        for entry in sorted(step.entries, key=lambda e: (len(e.ids) > 1, e.start if len(e.ids) <= 1 else 0)):
            row, num_ids = self.rows[entry.seq], max(1, len(entry.ids))
            chunks.append(Chunk(row.index, len(ids), entry.start, num_ids))
            ids += row.ids[entry.start : entry.start + num_ids]
            last_token[entry.seq] = len(ids) - 1
        sampling = [entry for entry in step.entries if entry.sample]
        draws = [(self.rows[entry.seq].sampling, entry.start + max(1, len(entry.ids))) for entry in sampling]
        return StepTensors(
            ids_T=torch.tensor(ids).to(self.device, non_blocking=True),
            positions_T=torch.cat([torch.arange(c.start, c.end) for c in chunks]).to(self.device, non_blocking=True),
            attention=self.visibility.of_step(chunks, self._tables),
            sampled_seqs=tuple(entry.seq for entry in sampling),
            sampled_rows_R=torch.tensor([last_token[entry.seq] for entry in sampling], dtype=torch.int64).to(
                self.device, non_blocking=True
            ),
            draws=Draws.of(draws, self.device),
        )

    def _open(self, new: NewSequence) -> None:
        assert new.seq not in self.rows, f"sequence {new.seq} is open already"
        built = SamplingParams(temperature=new.sampling.temperature, seed=new.sampling.seed)
        assert new.sampling == built, f"not built in the sampler, to be refused before it comes here: {new.sampling}"
        if not self._free:
            self._free = list(range(len(self._tables), 2 * len(self._tables)))
            self._tables = torch.cat([self._tables, torch.zeros_like(self._tables)])
        self.rows[new.seq] = Row(self._free.pop(), new.sampling, list(new.known_ids))

    def _extend(self, entry: Entry) -> list[int]:
        row = self.rows[entry.seq]
        if entry.ids:
            assert entry.start <= len(row.ids), f"sequence {entry.seq}: ids before position {entry.start} never came"
            row.ids[entry.start :] = entry.ids
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
        reused = -(-entry.start // self.block_size)  # blocks that hold positions before `start`
        return entry.new_blocks[max(0, reused - first) :]
