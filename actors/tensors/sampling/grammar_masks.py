"""Grammars of a rank's rows: threads compile them, follow the sampled ids, and make masks while the forward runs.

Every shard of the last stage follows the same ids, so that no message is needed; each applies its own part of a mask.

G rows with a mask · B bytes, eight ids each, that cover this shard's rows of the vocabulary.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from llguidance import LLTokenizer
from numpy.typing import NDArray

from actors.decisions.grammar import GrammarMatcher
from actors.decisions.model.shard_plan import Interval
from actors.tensors.backend import Download
from actors.tensors.sampling.tokenizer_file import read_vocabulary
from actors.words.messages import GRAMMAR_FAILED

logger = logging.getLogger(__name__)

NO_MASK_YET = -3  # in place of an id: the row's grammar is not compiled yet
_FIRST_MASK_S = 2e-3  # how long a step waits for grammars that are not compiled, before their rows go on without an id
_COMPILE_THREADS, _MASK_THREADS = 4, 4
_ROWS_A_TASK = 8  # a mask takes some 50 µs, handing it to a thread nearly as long


@dataclass(eq=False)
class RowGrammar:
    """One row's grammar. Threads write to it, one after the other, until `done` is done."""

    matcher: "Future[GrammarMatcher]"
    done: "Future[None] | None" = None  # the mask of the row's next id; None: no sample of it was due yet
    is_first: bool = True  # nobody has waited for a mask to its end
    allowed: NDArray[np.uint8] | None = None
    has_failed: bool = False


@dataclass(frozen=True)
class StepMasks:
    """The masks of a step, on the host."""

    rows: list[int]  # which of the step's rows are the G
    allowed_GB: torch.Tensor  # uint8: bit i % 8 of byte i // 8 for id i, counted from `first_bit`
    first_bit: int
    outcomes: dict[int, int] = field(default_factory=dict)  # by row: NO_MASK_YET or GRAMMAR_FAILED instead of an id


class Grammars:
    """Owns the threads and the vocabulary of a rank of the last stage. One thread uses it."""

    def __init__(self, vocab_rows: Interval, vocab_size: int) -> None:
        """`vocab_rows` of this shard; `vocab_size` of the model."""
        self._vocab_rows, self._vocab_size = vocab_rows, vocab_size
        self._compiling = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="grammar-compile")
        self._masking = ThreadPoolExecutor(_MASK_THREADS, thread_name_prefix="grammar-mask")
        self._vocabulary: Future[LLTokenizer]

    def load(self, folder: Path) -> None:
        """Begin to read the tokenizer. That takes up to a second of the interpreter's lock: not while steps run."""
        self._vocabulary = self._compiling.submit(read_vocabulary, folder, self._vocab_size)

    def open(self, grammar: str, stop_ids: Sequence[int]) -> RowGrammar:
        """Begin to compile the grammar of a new row; its text may end by `stop_ids`."""

        def compiled() -> GrammarMatcher:
            return GrammarMatcher(self._vocabulary.result(), grammar, stop_ids)

        return RowGrammar(self._compiling.submit(compiled))

    def begin(self, row: RowGrammar, ids: Sequence[int]) -> None:
        """Begin to make the first mask of a row, after these generated ids: many, where it is computed again."""
        if row.done is None:
            row.done = self._compiling.submit(_make_masks, [row], lambda: [list(ids)])

    def follow(self, rows: Sequence[tuple[int, RowGrammar]], sampled: Download) -> None:
        """Begin to make the masks after ids that were sampled, each row's at its index; threads wait for them."""
        ready = [(index, row) for index, row in rows if not row.is_first]  # others have sampled nothing
        for first in range(0, len(ready), _ROWS_A_TASK):
            indices, some = zip(*ready[first : first + _ROWS_A_TASK], strict=True)
            done = self._masking.submit(_make_masks, some, partial(_sampled, sampled, indices))
            for row in some:
                row.done = done

    def masks(self, rows: Sequence[tuple[int, RowGrammar]]) -> StepMasks:
        """The masks of a step's rows that have a grammar, each with its index. Waits for those that are compiled."""
        until, outcomes = time.monotonic() + _FIRST_MASK_S, dict[int, int]()
        first, end = self._vocab_rows
        allowed_GB = np.full((len(rows), -(-end // 8) - first // 8), 0xFF, dtype=np.uint8)
        for place, (index, row) in enumerate(rows):
            assert row.done is not None, "a mask was not asked for"
            wait([row.done], max(0.0, until - time.monotonic()) if row.is_first else None)
            if not row.done.done():
                outcomes[index] = NO_MASK_YET
                continue
            row.is_first = False
            if row.has_failed or row.allowed is None:
                outcomes[index] = GRAMMAR_FAILED
            else:
                allowed_GB[place] = row.allowed[first // 8 : -(-end // 8)]
        return StepMasks([index for index, _ in rows], torch.from_numpy(allowed_GB), first % 8, outcomes)


def _sampled(download: Download, indices: Sequence[int]) -> list[list[int]]:
    """What rows gained in a step: an id, or none."""
    ids = download.take().tolist()
    return [[ids[index]] if ids[index] >= 0 else [] for index in indices]


def _make_masks(rows: Sequence[RowGrammar], news: Callable[[], list[list[int]]]) -> None:
    """In a thread: follow the new ids of each row, and make the masks after them. An error fails its row alone."""
    for row, new_ids in zip(rows, news(), strict=True):
        if row.has_failed or (row.allowed is not None and not new_ids):
            continue  # no id, since another shard was not ready: the same one is drawn again
        try:
            matcher = row.matcher.result()
            matcher.follow(new_ids)
            row.allowed = matcher.allowed()
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            row.has_failed = True
            logger.warning("a grammar cannot be followed (%s): %.300s", type(error).__name__, error)
