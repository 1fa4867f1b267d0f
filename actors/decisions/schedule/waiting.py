"""Who waits for a lane, and who is dealt next: suspects, then the oldest, while there is room for its known ids."""

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
        """Put it among the others by age."""
        insort(self._sequences, sequence, key=age)

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        self._sequences.remove(sequence)

    def deal(self, lanes: Lanes, holdings: KVCacheManager, max_num_seqs: int, suspects: list[Sequence]) -> None:
        """Deal to the cheapest lanes while there is room for the known ids; suspects first: they hold up all others."""
        if not self._sequences:
            return
        unopened = (sequence for sequence in lanes.sequences if not sequence.is_open)
        promised = sum(holdings.num_blocks(len(seq.ids) + 1) for seq in unopened)
        running = lanes.num_sequences
        while self._sequences and running < max_num_seqs:
            head = next((seq for seq in suspects if seq.lane is None), self._sequences[0])
            need = min(holdings.num_blocks(len(head.ids) + 1), holdings.pool.num_blocks)
            if head.num_pending or promised + need > holdings.pool.num_available:
                return
            self._sequences.remove(head)
            lanes.deal(head)
            promised += need
            running += 1
