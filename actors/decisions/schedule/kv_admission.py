"""Lets as many requests into an engine as the KV cache will hold to their ends, so that none is preempted.

For callers with more requests than fit: a batch job. What requests will hold is their prompt, the blocks of a common
prefix counted once, and the answer as long as answers have turned out so far.
"""

import math
from collections import Counter
from collections.abc import Sequence

from actors.decisions.schedule.blocks import num_blocks_for
from actors.words.messages import Request

_NUM_BEFORE_GUESSING = 16  # answers that must have ended before shorter ones than asked for are expected
_WAITING = 1 / 8  # of max_num_seqs: so many more are let in, so that one is there when another ends


class OutputForecast:
    """How long answers become, of what they may be at most: the mean so far and one standard deviation."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0
        self._sum_of_squares = 0.0

    def observe(self, num_tokens: int, max_tokens: int) -> None:
        """Note how long an answer became."""
        share = num_tokens / max(1, max_tokens)
        self._count += 1
        self._sum += share
        self._sum_of_squares += share * share

    @property
    def share(self) -> float:
        """What is expected of an answer, of what it may be at most; from 0 to 1."""
        if self._count < _NUM_BEFORE_GUESSING:
            return 1.0
        mean = self._sum / self._count
        variance = max(0.0, self._sum_of_squares / self._count - mean * mean)
        return min(1.0, mean + math.sqrt(variance))


class KVAdmission:
    """Counts the blocks that the requests let in will hold at the end of their answers."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        """`num_blocks`: of the cache, each of `block_size` tokens; `max_num_seqs`: that the engine runs at once."""
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs + max(1, int(max_num_seqs * _WAITING))
        self._prefixes: Counter[int] = Counter()  # full blocks of prompts, by a hash over all ids up to their end
        self._held: dict[int, tuple[list[int], int, int]] = {}  # by ticket: its prefixes, other blocks, sequences
        self._num_own = 0  # blocks that no other request shares
        self._num_seqs = 0
        self._next_ticket = 0
        self.forecast = OutputForecast()

    @property
    def num_blocks_promised(self) -> int:
        """Blocks that those let in will hold."""
        return len(self._prefixes) + self._num_own

    def admit(self, requests: Sequence[Request]) -> int | None:
        """Let requests that belong together in → a ticket for `end`; None: wait until others have ended.

        A first one always is: an engine that has nothing to do would wait for nothing.
        """
        prefixes: list[int] = []
        num_own, share = 0, self.forecast.share
        for request in requests:
            own_prefixes = self._hashes(request)
            prefixes += own_prefixes
            length = len(request.prompt_ids) + math.ceil(round(request.max_tokens * share, 3))
            num_own += num_blocks_for(length, self._block_size) - len(own_prefixes)
        need = num_own + len(set(prefixes) - self._prefixes.keys())
        is_room = self.num_blocks_promised + need <= self._num_blocks
        if self._held and not (is_room and self._num_seqs + len(requests) <= self._max_num_seqs):
            return None
        self._prefixes.update(prefixes)
        self._num_own += num_own
        self._num_seqs += len(requests)
        self._next_ticket += 1
        self._held[self._next_ticket] = (prefixes, num_own, len(requests))
        return self._next_ticket

    def end(self, ticket: int) -> None:
        """What was let in holds nothing any more."""
        prefixes, num_own, num_seqs = self._held.pop(ticket)
        self._prefixes.subtract(prefixes)
        for prefix in set(prefixes):
            if not self._prefixes[prefix]:
                del self._prefixes[prefix]
        self._num_own -= num_own
        self._num_seqs -= num_seqs

    def _hashes(self, request: Request) -> list[int]:
        """A hash for each full block. Within one process, and a clash only counts a block too few."""
        ids = request.prompt_ids
        last, hashes = hash(request.cache_salt), []
        for end in range(self._block_size, len(ids) + 1, self._block_size):
            last = hash((last, *ids[end - self._block_size : end]))
            hashes.append(last)
        return hashes
