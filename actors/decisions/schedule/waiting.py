"""The sequences that wait for a lane, and which is dealt next: suspects, then the oldest, while the cache has room."""

from bisect import insort

from actors.decisions.schedule.kv_cache_manager import KVCacheManager
from actors.decisions.schedule.lanes import Lanes, age
from actors.decisions.schedule.sequence import Sequence


class Waiting:
    """Sequences without a lane, oldest first."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence, in order of age."""
        insort(self._sequences, sequence, key=age)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has ended."""
        self._sequences.remove(sequence)

    def deal(self, lanes: Lanes, kv_cache: KVCacheManager, max_num_seqs: int, suspects: list[Sequence]) -> None:
        """Deal sequences to the cheapest lanes while the cache has room for their known ids and one more.

        Suspects go first: they run alone, so all others wait for them.
        """
        if not self._sequences:
            return
        unopened = (sequence for sequence in lanes.sequences if not sequence.is_open)
        promised = sum(kv_cache.num_blocks(len(seq.ids) + 1) for seq in unopened)
        running = lanes.num_sequences
        while self._sequences and running < max_num_seqs:
            head = next((seq for seq in suspects if seq.lane is None), self._sequences[0])
            need = min(kv_cache.num_blocks(len(head.ids) + 1), kv_cache.pool.num_blocks)
            if head.num_pending or promised + need > kv_cache.pool.num_available:
                return
            self._sequences.remove(head)
            lanes.deal(head)
            promised += need
            running += 1
