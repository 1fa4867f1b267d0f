"""Grammars of a rank's rows: threads compile them, follow the sampled ids, and make masks while the forward runs.

Every shard of the last stage follows the same ids, so that no message is needed; each applies its own part of a mask.

G rows with a mask · B bytes, eight ids each, that cover this shard's rows of the vocabulary.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from llguidance import LLTokenizer
from numpy.typing import NDArray

from actors.decisions.grammar import GrammarMatcher
from actors.decisions.model.shard_plan import Interval
from actors.tensors.sampling.tokenizer_file import read_vocabulary
from actors.words.messages import GRAMMAR_FAILED

logger = logging.getLogger(__name__)

NO_MASK_YET = -3  # in place of an id: the row's grammar is not compiled yet
_FIRST_MASK_S = 2e-3  # how long a step waits for grammars that are not compiled, before their rows go on without an id
_COMPILE_THREADS, _MASK_THREADS = 2, 4
_ROWS_A_TASK = 8  # a mask takes some 50 µs, handing it to a thread nearly as long


@dataclass(eq=False)
class RowGrammar:
    """One row's grammar. Its threads write `allowed` and `has_failed` before `done` is done."""

    matcher: "Future[GrammarMatcher]"
    num_followed: int = 0  # generated ids that were handed to the threads
    done: "Future[None] | None" = None  # the mask after these ids; None: none was asked for
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

    def advance(self, rows: Iterable[tuple[RowGrammar, Sequence[int]]]) -> None:
        """Begin to make the masks that follow these generated ids, all of each row."""
        due = []
        for row, ids in rows:
            news = list(ids[row.num_followed :])
            if row.done is not None and not news:
                continue
            row.num_followed = len(ids)
            if row.done is None:  # many ids, where a row is computed again
                row.done = self._compiling.submit(_make_masks, [(row, news)])
            else:
                due.append((row, news))
        for first in range(0, len(due), _ROWS_A_TASK):
            task = due[first : first + _ROWS_A_TASK]
            done = self._masking.submit(_make_masks, task)
            for row, _ in task:
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


def _make_masks(rows: Sequence[tuple[RowGrammar, list[int]]]) -> None:
    """In a thread: follow new ids, and make the masks after them. What goes wrong fails that row alone."""
    for row, news in rows:
        try:
            matcher = row.matcher.result()
            matcher.follow(news)
            row.allowed = matcher.allowed()
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            row.has_failed = True
            logger.warning("a grammar cannot be followed (%s): %.300s", type(error).__name__, error)
