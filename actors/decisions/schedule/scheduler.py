"""Which sequences run in the next step of which lane: continuous batching over lanes, oldest first.

Pure: requests in, steps out, results in, events out. Every stage executes steps in the order of their numbers, so a
block that is released here may be handed out again at once: whatever still uses it runs earlier.
"""

from collections.abc import Mapping

import msgspec

from actors.decisions.schedule.blocks import BlockCounts, BlockPool
from actors.decisions.schedule.kv_cache_manager import KVCacheManager
from actors.decisions.schedule.lanes import Flights, Lane, Lanes, age
from actors.decisions.schedule.pace import PrefillPace
from actors.decisions.schedule.sequence import Sequence
from actors.decisions.schedule.settings import SchedulerSettings
from actors.decisions.schedule.stats import Stats
from actors.decisions.schedule.waiting import Waiting
from actors.words.messages import (
    NOT_A_NUMBER,
    Entry,
    ErrorCode,
    Event,
    FinishReason,
    NewSequence,
    Request,
    StepBatch,
    StepResult,
)  # fmt: skip

_PROMPT_LOGPROBS_CHUNK = 256  # ids of a step whose logprobs are asked: bounds the logits [ids, vocabulary rows]


class Scheduler:
    """All live sequences of one gang, where they stand, and what the ranks have been asked for."""

    def __init__(self, settings: SchedulerSettings, num_blocks: int, stats: Stats | None = None) -> None:
        """`num_blocks`: of the ranks' KV cache. `stats` has a clock of its own."""
        self.settings = settings
        self.num_blocks = num_blocks
        self.epoch = 0
        self.stats = stats or Stats()
        self._live: dict[str, Sequence] = {}
        self._suspects: list[Sequence] = []  # oldest first; nearly always none
        self._next_seq = 0
        self._next_step = 0
        self._pace = PrefillPace(settings.num_lanes)
        self._forget_ranks()

    def _forget_ranks(self) -> None:
        settings = self.settings
        self._holdings = KVCacheManager(BlockPool(self.num_blocks, settings.block_size), settings.prefix_cache)
        self._lanes = Lanes(settings.num_lanes)
        self._waiting = Waiting()
        self._closing: list[int] = []  # rows that the ranks may drop
        self._flights = Flights(settings.num_lanes * settings.depth)
        self._seen = -1
        self._pace.forget_flights()

    def begin_epoch(self) -> dict[int, dict[str, int]]:
        """The ranks have lost all that they held: everything live waits, to be computed again from its ids.

        Returns, of the steps that ranks may have died of, the requests and their places; see Quarantine.
        """
        places = self._flights.places
        self.epoch += 1
        self._forget_ranks()
        for sequence in self._live.values():
            if sequence.is_open or sequence.num_generated:
                self.stats.num_replayed += 1
                self.stats.num_replayed_tokens += len(sequence.ids)
            sequence.start_over()
            self._waiting.add(sequence)
        return places

    def suspect(self, suspects: Mapping[str, int]) -> None:
        """These run alone until they have more ids than so many; all others do not."""
        for request_id, sequence in self._live.items():
            sequence.suspect_until = suspects.get(request_id, -1)
        self._suspects = list(self._live.values())  # next_step keeps those that are

    def fail(self, request_id: str, error: str, code: ErrorCode) -> Event:
        """End a live request with an error."""
        return self._retire(self._live[request_id], "error", error, code)

    def add(self, request: Request, salt: str = "") -> None:
        """Queue a request. Raises ValueError for one that can never run: its id is taken, or the cache is too small."""
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id} is already running")
        self._holdings.check_length(len(request.prompt_ids) + request.max_tokens)
        sequence = Sequence(self._next_seq, request, salt, waiting_since=self.stats.clock())
        self._next_seq += 1
        self._live[request.request_id] = sequence
        self._waiting.add(sequence)

    def finish(self, request_id: str, reason: FinishReason = "abort") -> Event | None:
        """From outside: end a request; None when it is gone."""
        sequence = self._live.get(request_id)
        return None if sequence is None else self._retire(sequence, reason)

    def next_step(self) -> StepBatch | None:
        """The next step to submit, or None when every lane is busy or has nothing to do."""
        self._suspects = [seq for seq in self._suspects if seq.is_suspect and seq.finish_reason is None]
        self._waiting.deal(self._lanes, self._holdings, self.settings.max_num_seqs, self._suspects)
        alone = next((seq for seq in self._suspects if seq.lane is not None), None)
        if alone is not None and not all(flight.is_only_of(alone) for flight in self._flights):
            return None
        for lane in self._lanes.in_turn(alone):
            if lane.num_in_flight >= self.settings.depth:
                break
            if alone is None:
                self._lanes.hand_over(lane)
            sequences = [alone] if alone else self._lanes.may_go_with(lane)
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
        self._pace.completed(self.stats.clock())
        events = []
        sampled = zip(result.token_ids, result.logprobs or [[]] * len(result.token_ids), strict=True)
        prompt_logprobs = iter(result.prompt_logprobs)
        for sequence, entry in flight.entries:
            told = next(prompt_logprobs) if entry.prompt_logprobs else []
            ids, logprobs = next(sampled) if entry.sample else ([], [])
            sequence.num_pending -= entry.sample
            if sequence.finish_reason is None:
                told = sequence.take_unreported(entry, told)
                event = self._append(sequence, entry, ids)
                if logprobs or told:
                    logprobs = logprobs[: len(event.token_ids)]
                    event = msgspec.structs.replace(event, logprobs=logprobs, prompt_logprobs=told)
                if event.token_ids or event.finish_reason or told:
                    events.append(event)
        return events

    def fail_all(self, error: str) -> list[Event]:
        """End every live request with an error event."""
        return [self.fail(request_id, error, "gang_lost") for request_id in list(self._live)]

    @property
    def num_ids(self) -> dict[str, int]:
        """Prompt and generated, of every live request."""
        return {request_id: len(sequence.ids) for request_id, sequence in self._live.items()}

    def counts(self) -> BlockCounts:
        """The block account."""
        return self._holdings.pool.counts()

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
        """Steps submitted whose results are not here."""
        return len(self._flights)

    def check(self) -> None:
        """Hold the block account against the tables. Raises IntegrityError with the numbers."""
        self._holdings.pool.check(sequence.blocks for sequence in self._live.values())

    def _build(self, lane: Lane, sequences: list[Sequence]) -> StepBatch:
        """Oldest first: one token for each sequence that decodes, chunks of prompts in what is left of the budget.

        A guest's chunk is never its last: that one samples, in its own lane.
        """
        step = StepBatch(self.epoch, 0, lane.index, [], [], [])
        prefilling = {seq.seq for seq in sequences if seq.is_prefilling}
        decoding = {seq.seq for seq in sequences if seq.seq not in prefilling and seq.can_decode(self.settings.depth)}
        num_decoding = self._lanes.num_decoding if prefilling else 0
        for_prefill = self.settings.max_num_batched_tokens - len(decoding)
        for_prefill = self._pace.prefill_tokens(self._lanes.num_sequences - num_decoding, num_decoding, for_prefill)
        for sequence in sequences:
            if sequence.lane is None:
                continue  # preempted by an older one
            if sequence.seq in decoding:
                self._take(sequence, 1, step)
            elif sequence.seq in prefilling and (sequence.lane == lane.index or sequence.num_unscheduled > for_prefill):
                for_prefill -= self._take(sequence, for_prefill, step)
        return step

    def _take(self, sequence: Sequence, limit: int, step: StepBatch) -> int:
        """Add up to `limit` tokens of a sequence to a step; returns how many."""
        if sequence.wants_prompt_logprobs:
            asked = sum(len(entry.ids) for entry in step.entries if entry.prompt_logprobs)
            limit = min(limit, _PROMPT_LOGPROBS_CHUNK - asked)
        if limit <= 0:
            return 0
        known_ids = [] if sequence.is_open else self._holdings.reuse_prefix(sequence)
        start, held = sequence.num_scheduled, len(sequence.blocks)
        ids = sequence.ids[start : start + limit]
        count = len(ids) or 1  # no known id: "your last token"
        if not self._reserve(sequence, start + count):
            return 0
        if not sequence.is_open:
            sequence.is_open = True
            request = sequence.request
            step.opened.append(NewSequence(sequence.seq, request.sampling, known_ids, len(request.prompt_ids)))
            self.stats.opened(sequence, len(known_ids))
            held = 0  # the ranks' table starts with the shared blocks
        sample = start + count >= len(sequence.ids) + sequence.num_pending and sequence.wants_token
        entry = Entry(sequence.seq, start, ids, sequence.blocks[held:], sample, sequence.wants_prompt_logprobs)
        if entry.prompt_logprobs and start + count < len(sequence.request.prompt_ids):
            entry = msgspec.structs.replace(entry, next_prompt_id=sequence.ids[start + count])
        step.entries.append(entry)
        sequence.num_scheduled += count
        sequence.num_pending += sample
        self._holdings.cache_full_blocks(sequence)
        return count

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` positions, taken from the youngest sequence where none are left."""
        while not self._holdings.grow(sequence, num_tokens):
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
        self._pace.launched(step, self.stats.clock())
        self._flights.launch(step, lane, sequences)
        return step

    def _number(self, step: StepBatch) -> StepBatch:
        number, self._next_step = self._next_step, self._next_step + 1
        return StepBatch(step.epoch, number, step.lane, step.opened, step.closed, step.entries, self._seen)

    def _append(self, sequence: Sequence, entry: Entry, ids: list[int]) -> Event:
        """Take what an entry's result brings: the ids up to a stop id, and the end where it is one."""
        if NOT_A_NUMBER in ids:
            self._holdings.never_share(sequence)
            return self._retire(sequence, "error", "the model's logits are not finite", "numerical_error")
        accepted, reason = sequence.accept(entry, ids)
        self.stats.num_generated += len(accepted)
        if reason is not None:
            self._retire(sequence, reason)
        return Event(sequence.request.request_id, accepted, reason)

    def _preempt(self, sequence: Sequence) -> None:
        """Take back its blocks; it waits, keeps its ids, and is computed again from them (as after a lost gang)."""
        self._close(sequence)
        self.stats.num_preemptions += 1
        self._waiting.add(sequence)

    def _retire(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, code: ErrorCode | None = None
    ) -> Event:
        sequence.finish_reason = reason
        self.stats.num_finished[reason] += 1
        del self._live[sequence.request.request_id]
        if sequence.lane is None:
            self._waiting.remove(sequence)
        self._close(sequence)
        return Event(sequence.request.request_id, [], reason, error, code=code)

    def _close(self, sequence: Sequence) -> None:
        self._lanes.take_out(sequence)
        self._holdings.release(sequence)
        if sequence.is_open:
            self._closing.append(sequence.seq)
        sequence.is_open = False

    def _take_closing(self) -> list[int]:
        closing, self._closing = self._closing, []
        return closing
