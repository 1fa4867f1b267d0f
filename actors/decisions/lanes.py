"""The lanes of the pipeline: which sequence is in which, dealt by cost and handed over when lanes drift apart."""

from bisect import insort
from dataclasses import dataclass, field

from actors.decisions.sequence import Sequence


@dataclass(eq=False)
class Lane:
    """A micro-batch slot of the pipeline: the sequences dealt to it, and how many of its steps are in flight."""

    index: int
    sequences: list[Sequence] = field(default_factory=list)  # oldest first
    num_in_flight: int = 0
    last_step: int = -1

    @property
    def cost(self) -> float:
        """What a step of this lane is expected to take, in decode entries."""
        return sum(_cost(sequence) for sequence in self.sequences)


class Lanes:
    """All lanes of a gang. Every running sequence is in exactly one."""

    def __init__(self, count: int) -> None:
        self._lanes = [Lane(index) for index in range(count)]

    @property
    def sequences(self) -> list[Sequence]:
        """All running sequences."""
        return [sequence for lane in self._lanes for sequence in lane.sequences]

    @property
    def num_sequences(self) -> int:
        """How many run."""
        return sum(len(lane.sequences) for lane in self._lanes)

    def in_turn(self) -> list[Lane]:
        """Lanes in the order in which they may submit: the one whose last step is longest ago first."""
        return sorted(self._lanes, key=lambda lane: lane.last_step)

    def deal(self, sequence: Sequence) -> None:
        """Put a sequence into the cheapest lane."""
        _put(sequence, min(self._lanes, key=lambda lane: lane.cost))

    def take_out(self, sequence: Sequence) -> None:
        """Out of its lane, if it is in one."""
        if sequence.lane is not None:
            self._lanes[sequence.lane].sequences.remove(sequence)
            sequence.lane = None

    def hand_over(self, lane: Lane) -> None:
        """Move sequences without a step in flight to the cheapest lane, while that brings the two closer together."""
        if len(self._lanes) == 1:
            return
        lightest = min(self._lanes, key=lambda other: other.cost)
        gap = lane.cost - lightest.cost
        for sequence in [sequence for sequence in reversed(lane.sequences) if not sequence.num_pending]:
            if gap <= _cost(sequence):
                return
            gap -= 2 * _cost(sequence)
            self.take_out(sequence)
            _put(sequence, lightest)


def age(sequence: Sequence) -> int:
    """Sort key: oldest first."""
    return sequence.seq


def _put(sequence: Sequence, lane: Lane) -> None:
    insort(lane.sequences, sequence, key=age)
    sequence.lane = lane.index


def _cost(sequence: Sequence) -> float:
    """In decode entries: 1, a little more for each context token to attend to, and for each prompt token to compute."""
    return 1 + len(sequence.ids) / 2048 + max(0, sequence.num_unscheduled - 1) / 64
