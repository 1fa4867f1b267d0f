"""The shapes of steps that a device runs over static buffers: few of them, each captured once."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.settings import SchedulerSettings
from actors.words.messages import Bucket, Entry

MAX_MIXED_TOKENS = 512  # larger steps with chunks of prompts take so long that launching them hides behind them
_MIXED_TOKENS = (16, 32, 64, 128, 256, 512)
_ROWS = (1, 2, 4)  # and from 8 on in steps of 8
_ROWS_STEP = 8


def most_captured_tokens(settings: SchedulerSettings) -> int:
    """Tokens of the largest shape: of a mixed step, or of decode rows where there are more of them."""
    return min(settings.max_num_batched_tokens, max(MAX_MIXED_TOKENS, settings.max_num_seqs))


@dataclass(frozen=True)
class Buckets:
    """All shapes of a gang: steps that only decode by their rows, steps with chunks of prompts by their tokens."""

    shapes: tuple[Bucket, ...]  # ascending
    block_size: int

    @classmethod
    def of(
        cls, settings: SchedulerSettings, max_blocks: int, max_mixed_tokens: int, first_blocks: int | None = None
    ) -> "Buckets":
        """Rows 1, 2, 4, 8, 16, 24 … up to max_num_seqs; mixed steps of 16, 32, 64 … up to `max_mixed_tokens` tokens.

        Blocks of a table: `first_blocks`, twice that … up to `max_blocks`, or only these. One number is enough where
        attention reads no further than each row's length. Where it gathers whole tables it reads what they hold, so
        they are padded to at most twice what is needed. A mixed step's padding is one more sequence, whose table holds
        it whatever the number of its tokens.
        """
        max_rows = settings.max_num_seqs
        rows = _up_to(itertools.chain(_ROWS, itertools.count(_ROWS_STEP, _ROWS_STEP)), max_rows)
        tokens = _up_to(iter(_MIXED_TOKENS), min(max_mixed_tokens, settings.max_num_batched_tokens))
        shapes = set[Bucket]()
        for blocks in _doublings(first_blocks or max_blocks, max_blocks):
            shapes |= {Bucket(number, number, blocks, is_decode=True) for number in rows}
            for number in tokens:
                held = max(blocks, num_blocks_for(number, settings.block_size))
                shapes.add(Bucket(number, min(number, max_rows), held, is_decode=False))
        return cls(tuple(sorted(shapes)), settings.block_size)

    def gathering_at_most(self, num_keys: int) -> "Buckets":
        """Without the shapes that gather more keys than that, a whole table for each token; the first stays."""
        keys = {shape: shape.num_tokens * shape.num_blocks * self.block_size for shape in self.shapes}
        fits = tuple(shape for shape in self.shapes if keys[shape] <= num_keys)
        return Buckets(fits or self.shapes[:1], self.block_size)

    def of_step(self, entries: Sequence[Entry]) -> Bucket | None:
        """The smallest shape that holds a step; None where none does, or where it asks for logits of prompt ids."""
        if not entries or any(entry.prompt_logprobs for entry in entries):
            return None
        counts = [len(entry.ids) or 1 for entry in entries]
        num_tokens, num_seqs, is_decode = sum(counts), len(entries), max(counts) == 1
        end = max(entry.start + count for entry, count in zip(entries, counts, strict=True))
        num_blocks = num_blocks_for(end, self.block_size)
        for shape in self.shapes:
            is_large_enough = shape.num_tokens >= num_tokens and shape.num_seqs >= num_seqs
            if is_large_enough and shape.is_decode == is_decode and shape.num_blocks >= num_blocks:
                return shape
        return None


def _up_to(numbers: Iterator[int], last: int) -> list[int]:
    """The ascending numbers below `last`, and that."""
    return [*itertools.takewhile(lambda number: number < last, numbers), last]


def _doublings(first: int, last: int) -> list[int]:
    return _up_to((first << power for power in itertools.count()), last)
