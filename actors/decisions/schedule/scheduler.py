"""Decides which sequences run in the next step of which lane: continuous batching over lanes, oldest first.

It is pure: requests in, steps out, results in, events out. Every stage executes steps in the order of their numbers, so
a block that is released here may be allocated again in the next step: all steps that still use it run earlier.
"""

from collections.abc import Mapping

import msgspec

from actors.decisions.schedule.blocks import BlockCounts, BlockPool
from actors.decisions.schedule.fair_shares import FairShares
from actors.decisions.schedule.kv_cache_manager import KVCacheManager
from actors.decisions.schedule.lanes import Flights, Lane, Lanes, age
from actors.decisions.schedule.sequence import FAILURES, Sequence
from actors.decisions.schedule.settings import PROMPT_LOGPROBS_CHUNK, SchedulerSettings
from actors.decisions.schedule.stats import Stats
from actors.decisions.schedule.step_time import StepTimeModel
from actors.decisions.schedule.waiting import Waiting
from actors.words.messages import (
    Entry,
    ErrorCode,
    Event,
    FinishReason,
    NewSequence,
    Request,
    StepBatch,
    StepResult,
)  # fmt: skip


class Scheduler:
    """Owns all live sequences of one gang, the KV blocks, and the list of steps in flight."""

    def __init__(self, settings: SchedulerSettings, num_blocks: int, stats: Stats | None = None) -> None:
        """`num_blocks`: of the ranks' KV cache. Times are those of the clock of `stats`."""
        self.settings = settings
        self.num_blocks = num_blocks
        self.epoch = 0
        self.stats = stats or Stats()
        self._live: dict[str, Sequence] = {}
        self._suspects: list[Sequence] = []  # oldest first; nearly always none
        self._shares = FairShares()
        self._next_seq = 0
        self._next_step = 0
        self._step_times = StepTimeModel(settings.num_lanes)
        self._forget_ranks()

    def _forget_ranks(self) -> None:
        settings = self.settings
        self._kv_cache = KVCacheManager(BlockPool(self.num_blocks, settings.block_size), settings.prefix_cache)
        self._lanes = Lanes(settings.num_lanes)
        self._waiting = Waiting(self._shares)
        self._closing: list[int] = []  # numbers of sequences whose rows the ranks can drop
        self._flights = Flights(settings.num_lanes * settings.depth)
        self._seen = -1
        self._step_times.forget_flights()

    def begin_epoch(self) -> dict[int, dict[str, int]]:
        """Begin anew with ranks that hold nothing: all live sequences wait, to be computed again from their ids.

        Returns, of each step that a rank may have died in, its requests and how many ids each has once it is past that
        step; see Quarantine.
        """
        num_ids_after = self._flights.num_ids_after
        self.epoch += 1
        self._forget_ranks()
        for sequence in self._live.values():
            if sequence.is_open or sequence.num_generated:
                self.stats.num_replayed += 1
                self.stats.num_replayed_tokens += len(sequence.ids)
            sequence.start_over()
            self._waiting.add(sequence)
        return num_ids_after

    def suspect(self, suspects: Mapping[str, int]) -> None:
        """Let these requests, and no others, run alone until each has more ids than the number given."""
        for request_id, sequence in self._live.items():
            sequence.suspect_until = suspects.get(request_id, -1)
        self._suspects = list(self._live.values())  # next_step keeps those that are

    def fail(self, request_id: str, error: str, code: ErrorCode) -> Event:
        """End a live request with an error."""
        return self._retire(self._live[request_id], "error", error, code)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError where it can never run: its id is taken, or the cache is too small."""
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id} is already running")
        self._kv_cache.check_length(len(request.prompt_ids) + request.max_tokens)
        sequence = Sequence(self._next_seq, request, waiting_since=self.stats.queued(is_alone=not self._live))
        self._next_seq += 1
        self._live[request.request_id] = sequence
        self._waiting.add(sequence)

    def finish(self, request_id: str, reason: FinishReason = "abort") -> Event | None:
        """End a request from outside → its last event; None when it has ended before."""
        sequence = self._live.get(request_id)
        return None if sequence is None else self._retire(sequence, reason)

    def next_step(self) -> StepBatch | None:
        """The next step to submit, or None when every lane is busy or has nothing to do."""
        self._suspects = [seq for seq in self._suspects if seq.is_suspect and seq.finish_reason is None]
        self._waiting.deal(self._lanes, self._kv_cache, self.settings.max_num_seqs, self._suspects)
        alone = next((seq for seq in self._suspects if seq.lane is not None), None)
        if alone is not None and not all(flight.is_only_of(alone) for flight in self._flights):
            return None
        for lane in self._lanes.in_turn(alone):
            if lane.num_in_flight >= self.settings.depth:
                break
            if alone is None:
                self._lanes.hand_over(lane)
            sequences = [alone] if alone else self._lanes.candidates(lane)
            if (step := self._build(lane, sequences)).entries:
                return self._launch(lane, step, sequences)
        if self._closing and not self._flights:  # idle: let the ranks forget what has ended
            return self._number(StepBatch(self.epoch, 0, 0, [], self._take_closing(), []))
        return None

    def complete(self, result: StepResult) -> list[Event]:
        """Take the result of the oldest step in flight."""
        flight = self._flights.land()
        assert flight.step == result.step, f"result of step {result.step} while step {flight.step} was due"
        self._seen = result.step
        self._step_times.completed(self.stats.progressed())
        events = []
        sampled = zip(result.token_ids, result.logprobs or [[]] * len(result.token_ids), strict=True)
        prompt_logprobs = iter(result.prompt_logprobs)
        for sequence, entry in flight.entries:
            of_prompt = next(prompt_logprobs) if entry.prompt_logprobs else []
            ids, logprobs = next(sampled) if entry.sample else ([], [])
            sequence.num_pending -= entry.sample
            if sequence.finish_reason is None:
                event, of_prompt = self._append(sequence, entry, ids), sequence.take_unreported(entry, of_prompt)
                if logprobs or of_prompt:
                    logprobs = logprobs[: len(event.token_ids)]
                    event = msgspec.structs.replace(event, logprobs=logprobs, prompt_logprobs=of_prompt)
                if event.token_ids or event.finish_reason or of_prompt:
                    events.append(event)
        return events

    def resume(self) -> None:
        """Note that the ranks, which did something else between two steps, go on now."""
        self._step_times.stopped(self.stats.clock())

    def fail_all(self, error: str) -> list[Event]:
        """End every live request with an error event."""
        return [self.fail(request_id, error, "gang_lost") for request_id in list(self._live)]

    @property
    def num_ids(self) -> dict[str, int]:
        """How many ids, prompt and generated, every live request has."""
        return {request_id: len(sequence.ids) for request_id, sequence in self._live.items()}

    def counts(self) -> BlockCounts:
        """How many KV blocks are in each state."""
        return self._kv_cache.pool.counts()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def num_running(self) -> int:
        """Sequences dealt to a lane."""
        return self._lanes.num_sequences

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a lane."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Submitted steps whose results have not come."""
        return len(self._flights)

    def check(self) -> None:
        """Check the block pool against the sequences' block tables. Raises IntegrityError with the numbers."""
        self._kv_cache.pool.check(sequence.blocks for sequence in self._live.values())

    def _build(self, lane: Lane, sequences: list[Sequence]) -> StepBatch:
        """A step of one token for each sequence that decodes, and prompt chunks in what is left of the token budget.

        The oldest sequences go first. A chunk borrowed from another lane is never the last of its prompt: the last one
        is sampled from, which happens in the sequence's own lane.
        """
        step = StepBatch(self.epoch, 0, lane.index, [], [], [])
        prefilling = {seq.seq for seq in sequences if seq.is_prefilling}
        decoding = {seq.seq for seq in sequences if seq.seq not in prefilling and seq.can_decode(self.settings.depth)}
        num_decoding = self._lanes.num_decoding if prefilling else 0
        for_prefill = self.settings.max_num_batched_tokens - len(decoding)
        num_prefilling = self._lanes.num_sequences - num_decoding
        for_prefill = self._step_times.prefill_tokens(num_prefilling, num_decoding, for_prefill)
        for sequence in sequences:
            if sequence.lane is None:
                continue  # preempted by an older one
            if sequence.seq in decoding:
                self._take(sequence, 1, step)
            elif sequence.seq in prefilling and (sequence.lane == lane.index or sequence.num_unscheduled > for_prefill):
                for_prefill -= self._take(sequence, for_prefill, step)
        return step

    def _take(self, sequence: Sequence, limit: int, step: StepBatch) -> int:
        """Add up to `limit` tokens of a sequence to a step → how many."""
        if sequence.wants_prompt_logprobs:
            asked = sum(len(entry.ids) for entry in step.entries if entry.prompt_logprobs)
            limit = min(limit, PROMPT_LOGPROBS_CHUNK - asked)
        if limit <= 0:
            return 0
        known_ids = [] if sequence.is_open else self._kv_cache.reuse_prefix(sequence)
        start, held = sequence.num_scheduled, len(sequence.blocks)
        ids = sequence.ids[start : start + limit]
        count = len(ids) or 1  # no known id: "your last token"
        if not self._reserve(sequence, start + count):
            return 0
        if not sequence.is_open:
            sequence.open_row()
            request = sequence.request
            step.opened.append(NewSequence(sequence.seq, request.sampling, known_ids, len(request.prompt_ids)))
            self._shares.charge(request.key, 0 if sequence.has_begun else -len(known_ids))
            self.stats.opened(sequence, len(known_ids))
            held = 0  # the ranks' table starts with the shared blocks
        sample = start + count >= len(sequence.ids) + sequence.num_pending and sequence.wants_token
        entry = Entry(sequence.seq, start, ids, sequence.blocks[held:], sample, sequence.wants_prompt_logprobs)
        if entry.prompt_logprobs and start + count < len(sequence.request.prompt_ids):
            entry = msgspec.structs.replace(entry, next_prompt_id=sequence.ids[start + count])
        step.entries.append(entry)
        sequence.num_scheduled += count
        sequence.num_pending += sample
        self._kv_cache.cache_full_blocks(sequence)
        return count

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take blocks for the first `num_tokens` positions, from the youngest sequence where none are free.

        False when the sequence itself was the youngest, and is preempted.
        """
        while not self._kv_cache.grow(sequence, num_tokens):
            holders = [other for other in self._lanes.sequences if other.blocks]
            victim = max([sequence, *holders], key=age)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _launch(self, lane: Lane, step: StepBatch, sequences: list[Sequence]) -> StepBatch:
        step.closed.extend(self._take_closing())
        step = self._number(step)
        self.stats.launched(step)
        self._step_times.launched(step, self.stats.clock())
        self._flights.launch(step, lane, sequences)
        return step

    def _number(self, step: StepBatch) -> StepBatch:
        number, self._next_step = self._next_step, self._next_step + 1
        return StepBatch(step.epoch, number, step.lane, step.opened, step.closed, step.entries, self._seen)

    def _append(self, sequence: Sequence, entry: Entry, ids: list[int]) -> Event:
        """Take what an entry sampled, up to a stop id, and end the request where it is done."""
        if failure := next((FAILURES[token_id] for token_id in ids if token_id in FAILURES), None):
            if failure[1] == "numerical_error":  # then its blocks are wrong too
                self._kv_cache.never_share(sequence)
            return self._retire(sequence, "error", *failure)
        accepted, reason = sequence.accept(entry, ids)
        self._shares.charge(sequence.request.key, len(accepted))
        self.stats.generated(sequence, len(accepted))
        if reason is not None:
            self._retire(sequence, reason)
        return Event(sequence.request.request_id, accepted, reason, num_cached=sequence.num_cached)

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks and let it wait; it keeps its ids, and is computed again from them (as after a lost gang)."""
        self._close(sequence)
        self.stats.num_preemptions += 1
        self._waiting.add(sequence)

    def _retire(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, code: ErrorCode | None = None
    ) -> Event:
        sequence.finish_reason = reason
        self._shares.charge(sequence.request.key, -sequence.num_never_computed)
        self.stats.ended(sequence, reason)
        del self._live[sequence.request.request_id]
        if sequence.lane is None:
            self._waiting.remove(sequence)
        self._close(sequence)
        return Event(sequence.request.request_id, [], reason, error, code=code)

    def _close(self, sequence: Sequence) -> None:
        self._lanes.take_out(sequence)
        self._kv_cache.release(sequence)
        if sequence.is_open:
            self._closing.append(sequence.seq)
        sequence.is_open = False

    def _take_closing(self) -> list[int]:
        closing, self._closing = self._closing, []
        return closing
