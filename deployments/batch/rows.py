"""What goes from a batch job to the gangs and back: rows, their outcomes, and who answers them."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from deployments.api.bodies import GenerationBody
from deployments.api.responses import Stamp

# What an Answerer may hold of rows that it has pulled and not answered: order is restored behind it, in memory.
WINDOW_ROWS = 4096  # also how far past the oldest unanswered row it may pull
WINDOW_BYTES = 32 * 1024 * 1024  # of input; one row is always let in
ANSWER_BYTES = 256 * 1024 * 1024  # of answers behind the oldest unanswered row; then gangs get no other row


class Row(NamedTuple):
    """One row of the input that has passed the checks of its fields. What needs the model is still to be checked."""

    number: int  # in the input, from 0
    custom_id: str
    body: GenerationBody  # a CompletionBody or a ChatBody, never streamed; `seed` is always set
    stamp: Stamp  # for the response's body: the same in every run
    num_bytes: int  # of the row in the input


class Outcome(NamedTuple):
    """How one row ended, for good: what is not the row's own fault is no outcome, but an exception of `run`."""

    number: int  # of the row
    status: int  # as over HTTP: 200, or the ApiError's
    body: bytes  # the response's body, or ApiError.body(); nothing in it depends on what ran beside, or when


@dataclass
class Tally:
    """How far a job is, in rows. Changed by the job's thread, read by whoever shows progress."""

    total: int
    skipped: int = 0  # in parts that an earlier run has written
    completed: int = 0  # answered in this run
    failed: int = 0  # error rows of this run, those included that never came to the Answerer


class Answerer(Protocol):
    """Answers rows: the gangs, or a fake."""

    def run(self, rows: Iterator[Row]) -> Generator[Outcome, None, None]:
        """Pull rows as there is room for them → one outcome a row, in any order.

        `next(rows)` reads the input in the caller's thread and ends the iteration after the last row. Closing the
        returned generator ends what runs. Raises ValueError, with the remedy, where the gangs cannot go on.
        """
