"""The lanes of the pipeline: which sequence is in which, dealt by cost and moved when lanes drift apart.

A sequence's first chunk of prompt, its last one, and its decode tokens are computed in its own lane's steps. A step of
another lane may borrow the chunks between: they follow each other through the pipeline without waiting, and the long
steps are spread over all lanes.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from actors.decisions.schedule.sequence import Sequence
from actors.words.messages import Entry, StepBatch

_SLACK = 0.5  # decode entries that a lane may have too many: contexts grow, and nothing is to be moved to and fro


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
        """Whether no other sequence has an entry in it."""
        return all(other is sequence for other, _ in self.entries)

    @property
    def num_ids_after(self) -> dict[str, int]:
        """By request: how many ids it has once it is past this step; see Quarantine."""
        return {sequence.request.request_id: sequence.num_ids_after(entry) for sequence, entry in self.entries}


class Flights(deque[Flight]):
    """The steps in flight, oldest first; the last ones whose results came are remembered."""

    def __init__(self, num_remembered: int) -> None:
        super().__init__()
        self._landed: deque[Flight] = deque(maxlen=num_remembered)

    def launch(self, step: StepBatch, lane: Lane, sequences: list[Sequence]) -> None:
        """Add a step of a lane that was submitted; its entries belong to some of these sequences."""
        by_seq = {sequence.seq: sequence for sequence in sequences}
        self.append(Flight(step.step, lane, [(by_seq[entry.seq], entry) for entry in step.entries]))
        lane.num_in_flight += 1
        lane.last_step = step.step

    def land(self) -> Flight:
        """Take out the oldest step: its result is here."""
        self._landed.append(self.popleft())
        self._landed[-1].lane.num_in_flight -= 1
        return self._landed[-1]

    @property
    def num_ids_after(self) -> dict[int, dict[str, int]]:
        """By step, and by request of the step: how many ids the request has once it is past the step.

        Steps whose results are here are among them: a rank may fail in one that the answering rank has finished.
        """
        return {flight.step: flight.num_ids_after for flight in (*self._landed, *self)}


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
        """Running sequences."""
        return sum(len(lane.sequences) for lane in self._lanes)

    @property
    def num_decoding(self) -> int:
        """Running sequences whose prompt is computed."""
        return sum(not sequence.is_prefilling for lane in self._lanes for sequence in lane.sequences)

    def in_turn(self, alone: Sequence | None = None) -> list[Lane]:
        """The lanes that have work, their own or borrowed, in the order in which they may submit.

        The lane whose last step is longest ago comes first, and while it cannot submit, the others wait: of two steps
        of one lane in a row, the second would wait at the first stage until the first has left the last stage.
        With `alone` only the lane of that sequence.
        """
        if alone is not None and alone.lane is not None:
            return [self._lanes[alone.lane]]
        lanes = [lane for lane in self._lanes if lane.sequences or self._lenders(lane)]
        return sorted(lanes, key=lambda lane: lane.last_step)

    def candidates(self, lane: Lane) -> list[Sequence]:
        """The sequences that a step of this lane may compute: its own, and those it may borrow of, oldest first."""
        lenders = self._lenders(lane)
        return sorted(lane.sequences + lenders, key=age) if lenders else list(lane.sequences)

    def _lenders(self, lane: Lane) -> list[Sequence]:
        """The sequences of other lanes that this one may borrow a chunk of.

        Their first chunk has been submitted: so it is known how much of the prompt was cached, and what is left.
        """
        others = (other.sequences for other in self._lanes if other is not lane)
        return [seq for sequences in others for seq in sequences if seq.is_open and seq.num_unscheduled > 1]

    def deal(self, sequence: Sequence) -> None:
        """Put a sequence into the cheapest lane."""
        _put(sequence, min(self._lanes, key=lambda lane: lane.cost))

    def take_out(self, sequence: Sequence) -> None:
        """Take a sequence out of its lane, if it is in one."""
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
