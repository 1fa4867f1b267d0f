"""Decides which shape of a step is captured in a graph next, and when: the most wanted one first, and seldom."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from actors.decisions.schedule.buckets import Buckets
from actors.words.messages import Bucket, Captured, StepBatch

_EVERY_STEPS = 50  # at most one capture in so many steps: it stops all requests for a moment
_MOST_VAIN = 3  # captures that fail one after the other; then the model cannot be captured, and no more is tried


class GraphState(NamedTuple):
    """How far the ranks have come with their graphs."""

    num_shapes: int  # that they can capture; 0 where their device has no graphs
    num_captured: int
    failed: dict[Bucket, str]  # why others go on without


class CaptureRound:
    """What the ranks report of one capture."""

    def __init__(self, bucket: Bucket, num_ranks: int) -> None:
        self.bucket = bucket
        self._num_ranks = num_ranks
        self._reports: dict[int, Captured] = {}  # by rank

    def take(self, rank: int, report: Captured) -> Captured | None:
        """Take a rank's report → how the capture ended, once all have reported: a failure where any rank failed."""
        self._reports[rank] = report
        if len(self._reports) < self._num_ranks:
            return None
        return min(self._reports.items(), key=lambda item: (item[1].reason_not is None, item[0]))[1]


class Captures:
    """The graphs of one gang: what steps wanted, what the ranks of the present epoch have, and what is not to be had.

    The largest shape is the first one: the graphs of an epoch share one pool of memory, and what the largest takes
    holds all others. Then comes what most steps ran without a graph; of equals decode steps, and the larger shape.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._wanted: Counter[Bucket] = Counter()  # steps that ran without a graph
        self._never: dict[Bucket, str] = {}  # shapes whose capture was under way when an epoch ended
        self._under_way: Bucket | None = None
        self.begin_epoch((), is_to_blame=False)

    def begin_epoch(self, shapes: Sequence[Bucket], is_to_blame: bool) -> None:
        """Begin anew with ranks that have no graphs, and can capture `shapes`.

        `is_to_blame`: a capture that was under way when the last epoch ended may have ended it.
        """
        if self._under_way is not None and is_to_blame:
            self._never[self._under_way] = "the ranks ended while they captured it"
        self._under_way = None
        self._buckets = Buckets(tuple(shapes), self._block_size)
        self._since = 0  # steps since the last capture
        self._num_vain = len(self._never)
        self.captured: set[Bucket] = set()
        self.failed = {bucket: reason for bucket, reason in self._never.items() if bucket in shapes}

    @property
    def num_shapes(self) -> int:
        """Shapes that the ranks can capture; 0 where their device has no graphs."""
        return len(self._buckets.shapes)

    def submitted(self, step: StepBatch) -> None:
        """Note a step that goes to the ranks."""
        if self.num_shapes and step.entries:
            self._since += 1
            bucket = self._buckets.of_step(step.entries)
            if bucket is not None and bucket not in self.captured:
                self._wanted[bucket] += 1

    @property
    def state(self) -> GraphState:
        """What `/cluster` shows. Any thread may ask."""
        return GraphState(self.num_shapes, len(self.captured), dict(self.failed))

    def order(self, is_idle: bool) -> Bucket | None:
        """The shape to capture now, which then is under way until `ended`; None: nothing is to be captured now."""
        missing = [shape for shape in self._buckets.shapes if shape not in self.captured and shape not in self.failed]
        if self._under_way is not None or not missing or self._num_vain >= _MOST_VAIN:
            return None
        if not is_idle and (self._since < _EVERY_STEPS or not any(self._wanted[shape] for shape in missing)):
            return None
        if not self.captured and not self.failed:
            chosen = missing[-1]
        else:
            chosen = max(missing, key=lambda shape: (self._wanted[shape], shape.is_decode, shape))
        self._under_way, self._since = chosen, 0
        return chosen

    def ended(self, outcome: Captured) -> None:
        """Note how the capture that is under way ended."""
        self._under_way = None
        if outcome.reason_not is None:
            self.captured.add(outcome.bucket)
            self._num_vain = 0
        else:
            self.failed[outcome.bucket] = outcome.reason_not
            self._num_vain += 1
