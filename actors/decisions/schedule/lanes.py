"""The lanes of the pipeline: which sequence is in which, dealt by cost and handed over when lanes drift apart.

The first and the last chunk of a prompt, and all that samples, are in one lane. The chunks between go with the steps of
any, so that they follow each other through the pipeline, and no lane's steps alone are long.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from actors.decisions.schedule.sequence import Sequence
from actors.words.messages import Entry, StepBatch

_SLACK = 0.5  # decode entries that a lane may have too many: contexts grow, and nobody is to be moved to and fro


@dataclass(eq=False)
class Lane:
    """A micro-batch slot of the pipeline: the sequences dealt to it, and how many of its steps are in flight."""

    index: int
    sequences: list[Sequence] = field(default_factory=list)  # oldest first
    num_in_flight: int = 0
    last_step: int = -1

    @property
    def cost(self) -> float:
        """What a step of this lane is expected to take apart from prompts, in decode entries."""
        return sum(_cost(sequence) for sequence in self.sequences)


@dataclass(frozen=True)
class Flight:
    """A step that was submitted and whose result is not here."""

    step: int
    lane: Lane
    entries: list[tuple[Sequence, Entry]]

    def is_only_of(self, sequence: Sequence) -> bool:
        """Whether nobody else is in it."""
        return all(other is sequence for other, _ in self.entries)

    @property
    def places(self) -> dict[str, int]:
        """Its requests, and where each stands when it has got past this step; see Quarantine."""
        return {sequence.request.request_id: sequence.place_after(entry) for sequence, entry in self.entries}


class Flights(deque[Flight]):
    """The steps in flight, oldest first; those that landed last are remembered."""

    def __init__(self, num_remembered: int) -> None:
        super().__init__()
        self._landed: deque[Flight] = deque(maxlen=num_remembered)

    def launch(self, step: StepBatch, lane: Lane, sequences: list[Sequence]) -> None:
        """A step of a lane was submitted, whose entries are of some of these sequences."""
        by_seq = {sequence.seq: sequence for sequence in sequences}
        self.append(Flight(step.step, lane, [(by_seq[entry.seq], entry) for entry in step.entries]))
        lane.num_in_flight += 1
        lane.last_step = step.step

    def land(self) -> Flight:
        """The result of the oldest is here."""
        self._landed.append(self.popleft())
        self._landed[-1].lane.num_in_flight -= 1
        return self._landed[-1]

    @property
    def places(self) -> dict[int, dict[str, int]]:
        """Of each step its requests and their places. A rank may fail over one whose result its neighbours told."""
        return {flight.step: flight.places for flight in (*self._landed, *self)}


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

    @property
    def num_decoding(self) -> int:
        """How many of those that run have their prompt behind them."""
        return sum(not sequence.is_prefilling for lane in self._lanes for sequence in lane.sequences)

    def in_turn(self, alone: Sequence | None = None) -> list[Lane]:
        """Lanes that have something or may have a guest, in the order in which they may submit, or one's lane.

        The one whose last step is longest ago is first, and where it cannot submit yet, it is waited for: of two steps
        of one lane in a row the second would stand at the first stage until the first has passed the last.
        """
        if alone is not None and alone.lane is not None:
            return [self._lanes[alone.lane]]
        lanes = [lane for lane in self._lanes if lane.sequences or self._guests(lane)]
        return sorted(lanes, key=lambda lane: lane.last_step)

    def may_go_with(self, lane: Lane) -> list[Sequence]:
        """Its own sequences and those begun in others that have prompt ids left, oldest first."""
        guests = self._guests(lane)
        return sorted(lane.sequences + guests, key=age) if guests else list(lane.sequences)

    def _guests(self, lane: Lane) -> list[Sequence]:
        """Begun in a lane of their own: where a cached prefix ends is known, and so how much is left."""
        others = (other.sequences for other in self._lanes if other is not lane)
        return [seq for sequences in others for seq in sequences if seq.is_open and seq.num_unscheduled > 1]

    def deal(self, sequence: Sequence) -> None:
        """Put a sequence into the cheapest lane."""
        _put(sequence, min(self._lanes, key=lambda lane: lane.cost))

    def take_out(self, sequence: Sequence) -> None:
        """Out of its lane, if it is in one."""
        if sequence.lane is not None:
            self._lanes[sequence.lane].sequences.remove(sequence)
            sequence.lane = None

    def hand_over(self, lane: Lane) -> None:
        """Move sequences without a sample in flight to the cheapest lane, while that brings the two closer together."""
        if len(self._lanes) == 1:
            return
        lightest = min(self._lanes, key=lambda other: other.cost)
        gap = lane.cost - lightest.cost
        for sequence in [sequence for sequence in reversed(lane.sequences) if not sequence.num_pending]:
            if gap <= _cost(sequence) + _SLACK:
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
    """In decode entries: 1, and a little more for each context token to attend to."""
    return 1 + len(sequence.ids) / 2048
