"""The sequences that wait for a lane, and which is dealt next while the cache has room.

Suspects first: they run alone, so all others wait for them. Then what has run before, oldest first: its client is in
the middle of an answer. Then what is new: of the key that was served least the one of the lowest priority number, and
of these the oldest.
"""

from bisect import insort

from actors.decisions.schedule.fair_shares import FairShares
from actors.decisions.schedule.kv_cache_manager import KVCacheManager
from actors.decisions.schedule.lanes import Lanes, age
from actors.decisions.schedule.sequence import Sequence


class Waiting:
    """Sequences without a lane."""

    def __init__(self, shares: FairShares) -> None:
        self._shares = shares
        self._begun: list[Sequence] = []  # oldest first
        self._new: dict[str, list[Sequence]] = {}  # by key, each in its order; no empty ones
        self._count = 0

    def __len__(self) -> int:
        """Any thread may ask."""
        return self._count

    def add(self, sequence: Sequence) -> None:
        """Add a sequence, in its order."""
        self._count += 1
        if sequence.has_begun:
            insort(self._begun, sequence, key=age)
            return
        key = sequence.request.key
        if key not in self._new:
            self._shares.arrive(key, self._new)
        insort(self._new.setdefault(key, []), sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has ended, or is dealt."""
        self._count -= 1
        if sequence.has_begun:
            self._begun.remove(sequence)
            return
        queue = self._new[sequence.request.key]
        queue.remove(sequence)
        if not queue:
            del self._new[sequence.request.key]

    def deal(self, lanes: Lanes, kv_cache: KVCacheManager, max_num_seqs: int, suspects: list[Sequence]) -> None:
        """Deal sequences to the cheapest lanes while the cache has room for their known ids and one more."""
        if not self._count:
            return
        unopened = (sequence for sequence in lanes.sequences if not sequence.is_open)
        promised = sum(kv_cache.num_blocks(len(seq.ids) + 1) for seq in unopened)
        running = lanes.num_sequences
        while self._count and running < max_num_seqs:
            head = next((seq for seq in suspects if seq.lane is None), None) or self._first()
            need = min(kv_cache.num_blocks(len(head.ids) + 1), kv_cache.pool.num_blocks)
            if head.num_pending or promised + need > kv_cache.pool.num_available:
                return
            self.remove(head)
            if not head.is_charged:
                self._shares.take_turn(head.request.key, len(head.ids))
                head.is_charged = True
            lanes.deal(head)
            promised += need
            running += 1

    def _first(self) -> Sequence:
        if self._begun:
            return self._begun[0]
        return min((queue[0] for queue in self._new.values()), key=self._turn)

    def _turn(self, sequence: Sequence) -> tuple[int, int]:
        return self._shares.served(sequence.request.key), age(sequence)


def _place(sequence: Sequence) -> tuple[int, int]:
    """Sort key among the new ones of a key."""
    return sequence.request.priority, age(sequence)
