"""What is said between user, engine and ranks: requests, steps, results, events."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How a sequence's next id is drawn. Temperature 0 is greedy."""

    temperature: float = 1.0
    seed: int | None = None  # 63 bits; noise is a function of (seed, position, token id); the engine draws one for None


class Request(msgspec.Struct, frozen=True):
    """One completion asked for, in token ids. Its sequence carries the same id."""

    request_id: str
    prompt_ids: list[int]  # at least one id
    max_tokens: int  # at least 1; prompt + max_tokens fits the context
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()  # end of sequence among them, unless ignore_eos


class Event(msgspec.Struct, frozen=True):
    """What leaves the engine for a request: new ids, and in its last event why it ended.

    Exactly one event of a request has a `finish_reason`. With "stop" the last id of `token_ids` is the stop id itself.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error": what happened, fit for a client


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """Opens a row in the ranks' tables. `known_ids` stand before the first entry's ids (cached prefix; else empty)."""

    seq: int
    sampling: SamplingParams
    known_ids: list[int]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's share of a step: its ids from position `start` on, and the blocks it gains.

    Empty `ids` mean "your last token" (one id, sampled by an earlier step that the engine has not seen yet).
    """

    seq: int
    start: int  # position of the first id = ids already in the cache
    ids: list[int]
    new_blocks: list[int]  # appended to the sequence's block table
    sample: bool  # False for a prefill chunk that is not the last


class StepBatch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One step of one lane, the same to all ranks: differences only."""

    epoch: int
    step: int  # counts up by one over all lanes: the order in which every stage executes
    lane: int
    opened: list[NewSequence]
    closed: list[int]  # sequences whose rows are dropped before this step runs
    entries: list[Entry]  # may be empty when only rows are dropped


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Ask a rank to leave its loop."""

    epoch: int


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """From shard 0 of the last stage: for each entry that sampled, in order, the ids it gained (a list: speculation fits)."""

    epoch: int
    step: int
    token_ids: list[list[int]]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Said by every rank once a second, from a side thread."""

    epoch: int
    rank: int
    step: int  # last step begun


class RankFailure(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's own word that it cannot go on."""

    epoch: int
    rank: int
    step: int
    error: str


ToRank = StepBatch | Shutdown
FromRank = StepResult | Heartbeat | RankFailure
