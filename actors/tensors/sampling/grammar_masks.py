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
from numpy.typing import NDArray

from actors.decisions.grammar import GrammarMatcher
from actors.decisions.model.shard_plan import Interval
from actors.tensors.backend import Download
from actors.tensors.sampling.compiled_grammars import Compilation, CompiledGrammars, NoVocabularyError
from actors.words.messages import GRAMMAR_FAILED, NO_VOCABULARY

logger = logging.getLogger(__name__)

NO_MASK_YET = -3  # in place of an id: the row's grammar is not compiled yet
_FIRST_MASK_S = 2e-3  # how long a step waits for grammars that are not compiled, before their rows go on without an id
_FIRST_MASK_THREADS, _MASK_THREADS = 2, 4
_ROWS_A_TASK = 8  # a mask takes some 50 µs, handing it to a thread nearly as long
_COSTLY_S = 5e-4  # a row whose mask took longer has a task of its own


@dataclass(eq=False)
class RowGrammar:
    """One row's grammar. Threads write to it, one after the other, until `done` is done."""

    compilation: Compilation
    end_ids: Sequence[int]
    matcher: GrammarMatcher | None = None
    done: "Future[None] | None" = None  # the mask of the row's next id; None: no sample of it was due yet
    is_first: bool = True  # nobody has waited for a mask to its end
    has_waited: bool = False  # a step has waited for its first mask, in vain
    allowed: NDArray[np.uint8] | None = None
    mask_s: float = 0.0  # a processor's seconds for the last one
    failure: int | None = None  # what stands in place of its ids
    is_closed: bool = False


@dataclass(frozen=True)
class StepMasks:
    """The masks of a step, on the host."""

    rows: list[int]  # which of the step's rows are the G
    allowed_GB: torch.Tensor  # uint8: bit i % 8 of byte i // 8 for id i, counted from `first_bit`
    first_bit: int
    outcomes: dict[int, int] = field(default_factory=dict)  # by row: what stands in place of an id


class Grammars:
    """Owns the threads and the vocabulary of a rank of the last stage. One thread uses it."""

    def __init__(self, vocab_rows: Interval, vocab_size: int) -> None:
        """`vocab_rows` of this shard; `vocab_size` of the model."""
        self._vocab_rows = vocab_rows
        self._compiled = CompiledGrammars(vocab_size)
        self._beginning = ThreadPoolExecutor(_FIRST_MASK_THREADS, thread_name_prefix="grammar-first-mask")
        self._masking = ThreadPoolExecutor(_MASK_THREADS, thread_name_prefix="grammar-mask")

    def load(self, folder: Path) -> None:
        """Begin to read the tokenizer. That takes up to a second of the interpreter's lock: not while steps run."""
        self._compiled.load(folder)

    def open(self, grammar: str, end_ids: Sequence[int]) -> RowGrammar:
        """Begin to compile the grammar of a new row; its text may end by `end_ids`."""
        return RowGrammar(self._compiled.open(grammar), end_ids)

    def close(self, row: RowGrammar) -> None:
        """The row is in no further step."""
        row.is_closed = True
        self._compiled.close(row.compilation)

    def begin(self, row: RowGrammar, ids: Sequence[int]) -> None:
        """Begin to make the first mask of a row, after these generated ids: many, where it is computed again."""
        if row.done is not None:
            return
        row.done, news = Future(), [list(ids)]
        make = partial(_make_first_mask, row, row.done, news)
        # no thread waits for what is compiled: it would be one less to compile
        row.compilation.new_matcher.add_done_callback(
            lambda compiled: None if compiled.cancelled() else self._beginning.submit(make)
        )

    def follow(self, rows: Sequence[tuple[int, RowGrammar]], sampled: Download) -> None:
        """Begin to make the masks after ids that were sampled, each row's at its index; threads wait for them."""
        ready = [(index, row) for index, row in rows if not row.is_first]  # others have sampled nothing
        cheap = [one for one in ready if one[1].mask_s <= _COSTLY_S]
        tasks = [cheap[first : first + _ROWS_A_TASK] for first in range(0, len(cheap), _ROWS_A_TASK)]
        for task in [*tasks, *([one] for one in ready if one[1].mask_s > _COSTLY_S)]:
            indices, some = zip(*task, strict=True)
            done = self._masking.submit(_make_masks, some, partial(_sampled, sampled, indices))
            for row in some:
                row.done = done

    def masks(self, rows: Sequence[tuple[int, RowGrammar]], num_rows: int) -> StepMasks:
        """The masks of those of a step's `num_rows` that have a grammar, each with its index.

        Waits for those that are compiled, and a moment for each other one; not twice, where another row would wait too.
        """
        others_wait = num_rows > sum(row.is_first for _, row in rows)
        until, outcomes = time.monotonic() + _FIRST_MASK_S, dict[int, int]()
        first, end = self._vocab_rows
        allowed_GB = np.full((len(rows), -(-end // 8) - first // 8), 0xFF, dtype=np.uint8)
        for place, (index, row) in enumerate(rows):
            assert row.done is not None, "a mask was not asked for"
            patience_s = 0.0 if others_wait and row.has_waited else max(0.0, until - time.monotonic())
            wait([row.done], patience_s if row.is_first else None)
            if not row.done.done():
                outcomes[index], row.has_waited = NO_MASK_YET, True
                continue
            row.is_first = False
            if row.failure is not None:
                outcomes[index] = row.failure
            else:
                assert row.allowed is not None
                allowed_GB[place] = row.allowed[first // 8 : -(-end // 8)]
        return StepMasks([index for index, _ in rows], torch.from_numpy(allowed_GB), first % 8, outcomes)


def _sampled(download: Download, indices: Sequence[int]) -> list[list[int]]:
    """What rows gained in a step: an id, or none."""
    ids = download.take().tolist()
    return [[ids[index]] if ids[index] >= 0 else [] for index in indices]


def _make_first_mask(row: RowGrammar, done: "Future[None]", news: list[list[int]]) -> None:
    try:
        _make_masks([row], lambda: news)
    finally:
        done.set_result(None)


def _make_masks(rows: Sequence[RowGrammar], news: Callable[[], list[list[int]]]) -> None:
    """In a thread: follow the new ids of each row, and make the masks after them. An error fails its row alone."""
    for row, new_ids in zip(rows, news(), strict=True):
        if row.is_closed or row.failure is not None or (row.allowed is not None and not new_ids):
            continue  # no id, since another shard was not ready: the same one is drawn again
        try:
            began_s = time.thread_time()
            if row.matcher is None:
                row.matcher = row.compilation.new_matcher.result()(row.end_ids)
            row.matcher.follow(new_ids)
            row.allowed = row.matcher.allowed()
            row.mask_s = time.thread_time() - began_s
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            row.failure = NO_VOCABULARY if isinstance(error, NoVocabularyError) else GRAMMAR_FAILED
            logger.warning("a grammar cannot be followed (%s): %.300s", type(error).__name__, error)
