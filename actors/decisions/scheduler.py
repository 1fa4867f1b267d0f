"""Which sequences run in the next step of which lane: continuous batching over lanes, oldest first.

Pure: requests in, steps out, results in, events out. Every stage executes steps in the order of their numbers, so a
block that is released here may be handed out again at once: whatever still uses it runs earlier.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from actors.decisions.blocks import BlockCounts, BlockPool
from actors.decisions.sequence import Sequence
from actors.words.messages import Entry, Event, FinishReason, NewSequence, Request, StepBatch, StepResult


@dataclass(frozen=True)
class SchedulerSettings:
    """Limits of one gang."""

    num_blocks: int
    block_size: int  # tokens
    max_num_seqs: int  # sequences that hold blocks at the same time
    max_num_batched_tokens: int  # tokens of one step
    num_lanes: int
    depth: int = 1  # steps in flight of one lane
    prefix_cache: bool = True


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


@dataclass(frozen=True)
class _Flight:
    step: int
    lane: Lane
    sampled: list[Sequence]


class Scheduler:
    """All live sequences of one gang, where they stand, and what the ranks have been asked for."""

    def __init__(self, settings: SchedulerSettings, epoch: int = 0) -> None:
        self.settings = settings
        self.epoch = epoch
        self.num_preemptions = 0
        self._pool = BlockPool(settings.num_blocks, settings.block_size)
        self._lanes = [Lane(index) for index in range(settings.num_lanes)]
        self._live: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # oldest first
        self._closing: list[int] = []  # rows that the ranks may drop
        self._flights: deque[_Flight] = deque()
        self._next_seq = 0
        self._next_step = 0

    def add(self, request: Request, salt: str = "") -> None:
        """Queue a request. Raises ValueError for one that could never run: its id is taken, or the cache is too small."""
        longest = len(request.prompt_ids) + request.max_tokens
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id} is already running")
        if self._blocks_for(longest) > self.settings.num_blocks:
            raise ValueError(
                f"{longest} tokens (prompt and max_tokens) need {self._blocks_for(longest)} KV blocks, the cache has "
                f"{self.settings.num_blocks}; shorten the prompt, lower max_tokens, or raise cache.num_blocks"
            )
        sequence = Sequence(self._next_seq, request, salt)
        self._next_seq += 1
        self._live[request.request_id] = sequence
        insort(self._waiting, sequence, key=_age)

    def finish(self, request_id: str, at_token: int | None = None) -> Event | None:
        """End a request from outside: cut after `at_token` generated ids ("stop"), or aborted. None when it is gone."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        return self._retire(sequence, "abort" if at_token is None else "stop")

    def next_step(self) -> StepBatch | None:
        """The next step to submit, or None when every lane is busy or has nothing to do."""
        self._deal()
        for lane in sorted(self._lanes, key=lambda lane: lane.last_step):
            if lane.sequences and lane.num_in_flight < self.settings.depth:
                self._hand_over(lane)
                step = self._build(lane)
                if step.entries:
                    return self._launch(lane, step)
        if self._closing and not self._flights:  # idle: let the ranks forget what has ended
            return self._number(StepBatch(self.epoch, 0, 0, [], self._take_closing(), []))
        return None

    def complete(self, result: StepResult) -> list[Event]:
        """Take the result of the oldest step in flight."""
        flight = self._flights.popleft()
        assert flight.step == result.step, f"result of step {result.step} while step {flight.step} was due"
        flight.lane.num_in_flight -= 1
        events = []
        for sequence, ids in zip(flight.sampled, result.token_ids, strict=True):
            sequence.num_pending -= 1
            if sequence.finish_reason is None:
                events.append(self._append(sequence, ids))
        return events

    def fail_all(self, error: str) -> list[Event]:
        """End every live request with an error event."""
        return [self._retire(sequence, "error", error) for sequence in list(self._live.values())]

    def counts(self) -> BlockCounts:
        """The block account."""
        return self._pool.counts()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def num_running(self) -> int:
        """Sequences dealt to a lane."""
        return sum(len(lane.sequences) for lane in self._lanes)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a lane."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps submitted whose results are not here."""
        return len(self._flights)

    def check(self) -> None:
        """Hold the block account against the tables. Raises IntegrityError with the numbers."""
        self._pool.check(sequence.blocks for sequence in self._live.values())

    # -- into lanes ----------------------------------------------------------------------------------------------

    def _deal(self) -> None:
        """Deal waiting sequences to the cheapest lanes, oldest first, while there is room for their known ids."""
        unopened = (seq for lane in self._lanes for seq in lane.sequences if not seq.is_open)
        promised = sum(self._blocks_for(len(seq.ids) + 1) for seq in unopened)
        running = self.num_running
        while self._waiting and running < self.settings.max_num_seqs:
            head = self._waiting[0]
            need = min(self._blocks_for(len(head.ids) + 1), self.settings.num_blocks)
            if head.num_pending or promised + need > self._pool.num_available:
                return
            self._waiting.pop(0)
            _put(head, min(self._lanes, key=lambda lane: lane.cost))
            promised += need
            running += 1

    def _hand_over(self, lane: Lane) -> None:
        """Move sequences without a step in flight to the cheapest lane while that brings the two closer together."""
        lightest = min(self._lanes, key=lambda lane: lane.cost)
        for sequence in reversed([seq for seq in lane.sequences if not seq.num_pending]):
            if lane.cost - lightest.cost <= _cost(sequence):
                return
            lane.sequences.remove(sequence)
            _put(sequence, lightest)

    # -- into a step ---------------------------------------------------------------------------------------------

    def _build(self, lane: Lane) -> StepBatch:
        """Oldest first: one token for each sequence that decodes, and chunks of prompts in what is left of the budget."""
        step = StepBatch(self.epoch, 0, lane.index, [], [], [])
        budget = self.settings.max_num_batched_tokens
        decoding = [seq for seq in lane.sequences if not seq.is_prefilling and self._can_decode(seq)]
        for_prefill = budget - len(decoding)
        for sequence in list(lane.sequences):
            if sequence.lane != lane.index:
                continue  # preempted by an older one
            if sequence.is_prefilling:
                for_prefill -= self._take(sequence, for_prefill, step)
            elif self._can_decode(sequence) and budget > 0:
                budget -= self._take(sequence, 1, step)
        return step

    def _can_decode(self, sequence: Sequence) -> bool:
        return sequence.wants_token and (
            sequence.num_unscheduled == 1 or 0 < sequence.num_pending < self.settings.depth
        )

    def _take(self, sequence: Sequence, limit: int, step: StepBatch) -> int:
        """Add up to `limit` tokens of a sequence to a step; returns how many."""
        if limit <= 0:
            return 0
        known_ids = [] if sequence.is_open else self._reuse_prefix(sequence)
        start, held = sequence.num_scheduled, len(sequence.blocks)
        ids = sequence.ids[start : start + limit]
        count = len(ids) or 1  # no known id: "your last token"
        if not self._reserve(sequence, start + count):
            return 0
        if not sequence.is_open:
            sequence.is_open = True
            step.opened.append(NewSequence(sequence.seq, sequence.request.sampling, known_ids))
            held = 0  # the ranks' table starts with the shared blocks
        sample = start + count >= len(sequence.ids) + sequence.num_pending
        step.entries.append(Entry(sequence.seq, start, ids, sequence.blocks[held:], sample))
        sequence.num_scheduled += count
        sequence.num_pending += sample
        self._name_blocks(sequence)
        return count

    def _reuse_prefix(self, sequence: Sequence) -> list[int]:
        """Take the cached blocks of the longest known prefix; at least one id is left to compute."""
        if self.settings.prefix_cache and not sequence.blocks:
            usable = (len(sequence.ids) - 1) // self.settings.block_size
            sequence.blocks = self._pool.share(sequence.full_hashes(self.settings.block_size)[:usable])
            sequence.num_scheduled = len(sequence.blocks) * self.settings.block_size
        return sequence.ids[: sequence.num_scheduled]

    def _name_blocks(self, sequence: Sequence) -> None:
        if not self.settings.prefix_cache:
            return
        size = self.settings.block_size
        num_full = min(sequence.num_scheduled, len(sequence.ids)) // size
        hashes = sequence.full_hashes(size)
        for index in range(sequence.num_named, num_full):
            self._pool.name(sequence.blocks[index], hashes[index])
        sequence.num_named = num_full

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` positions, taken from the youngest sequence where none are left."""
        need = self._blocks_for(num_tokens) - len(sequence.blocks)
        while (blocks := self._pool.allocate(max(0, need))) is None:
            victim = max((seq for lane in self._lanes for seq in lane.sequences if seq.blocks), key=_age)
            victim = max(victim, sequence, key=_age)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _launch(self, lane: Lane, step: StepBatch) -> StepBatch:
        by_seq = {sequence.seq: sequence for sequence in lane.sequences}
        step.closed.extend(self._take_closing())
        step = self._number(step)
        lane.num_in_flight += 1
        lane.last_step = step.step
        sampled = [by_seq[entry.seq] for entry in step.entries if entry.sample]
        self._flights.append(_Flight(step.step, lane, sampled))
        return step

    def _number(self, step: StepBatch) -> StepBatch:
        number, self._next_step = self._next_step, self._next_step + 1
        return StepBatch(step.epoch, number, step.lane, step.opened, step.closed, step.entries)

    # -- out of lanes --------------------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, ids: list[int]) -> Event:
        request = sequence.request
        accepted: list[int] = []
        for token in ids:
            accepted.append(token)
            sequence.ids.append(token)
            if token in request.stop_token_ids:
                return self._retire(sequence, "stop", ids=accepted)
            if sequence.num_generated >= request.max_tokens:
                return self._retire(sequence, "length", ids=accepted)
        return Event(request.request_id, accepted)

    def _preempt(self, sequence: Sequence) -> None:
        """Take back its blocks; it waits, keeps its ids, and is computed again from them (as after a lost gang)."""
        self._close(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=_age)

    def _retire(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, ids: list[int] | None = None
    ) -> Event:
        sequence.finish_reason = reason
        del self._live[sequence.request.request_id]
        if sequence.lane is None:
            self._waiting.remove(sequence)
        self._close(sequence)
        return Event(sequence.request.request_id, ids or [], reason, error)

    def _close(self, sequence: Sequence) -> None:
        if sequence.lane is not None:
            self._lanes[sequence.lane].sequences.remove(sequence)
            sequence.lane = None
        self._pool.release(sequence.blocks)
        if sequence.is_open:
            self._closing.append(sequence.seq)
        sequence.blocks, sequence.num_scheduled, sequence.num_named, sequence.is_open = [], 0, 0, False

    def _take_closing(self) -> list[int]:
        closing, self._closing = self._closing, []
        return closing

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.settings.block_size)


def _put(sequence: Sequence, lane: Lane) -> None:
    insort(lane.sequences, sequence, key=_age)
    sequence.lane = lane.index


def _age(sequence: Sequence) -> int:
    return sequence.seq


def _cost(sequence: Sequence) -> float:
    """In decode entries: 1, a little more for each context token to attend to, and for each prompt token to compute."""
    return 1 + len(sequence.ids) / 2048 + max(0, sequence.num_unscheduled - 1) / 64
