"""The messages between HTTP, engine and ranks: requests, steps, results, events."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
# What kind of error: the gang did not come back · the request itself ends ranks · its logits are not numbers ·
# its grammar is too complex for the limits · the ranks can follow no grammar
ErrorCode = Literal["gang_lost", "ends_ranks", "numerical_error", "grammar_error", "no_grammars"]

NOT_A_NUMBER = -1  # in place of an id: the logits that it would be drawn from are not finite
GRAMMAR_FAILED = -2  # in place of an id: the row's grammar cannot be followed
NO_VOCABULARY = -4  # in place of an id: no grammar can be, since the rank could not read the tokenizer


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How a sequence's next id is drawn, in OpenAI's terms and vLLM's; the defaults change nothing.

    Order: repetition, presence and frequency penalties, logit_bias and bad_words change the logits, and allowed_ids
    leaves only these; temperature divides them (0 is greedy and ends here); then top_k, top_p and min_p cut, each over
    what the one before left. Before all of them a grammar takes out the ids with which the text could not go on.
    """

    temperature: float = 1.0
    seed: int | None = None  # 63 bits; noise is a function of (seed, position, token id); the engine draws one for None
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # share of the most likely token's probability
    repetition_penalty: float = 1.0  # over prompt and generated ids; Keskar et al. 2019, CTRL
    presence_penalty: float = 0.0  # over generated ids, as OpenAI defines it
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0  # before so many generated ids, none of `stop_ids` is drawn; not with a grammar
    stop_ids: list[int] = []  # the request's, where min_tokens or a grammar is set; the engine fills it in
    logprobs: int | None = None  # of each generated id, and of so many most likely ones; None: not asked
    prompt_logprobs: int | None = None  # the same of each prompt id after the first
    # A grammar of llguidance (its JSON or Lark form) that the generated text fulfils; None: any text. `stop_ids` are
    # drawn only where the text may end, and must be where it can only end.
    grammar: str | None = None
    allowed_ids: list[int] = []  # only these are drawn; none: all
    bad_words: list[list[int]] = []  # ids that may not follow each other; see bad_words.py


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one id under the model's own distribution (before penalties and temperature), and the best."""

    logprob: float
    top_ids: list[int]  # most likely first
    top_logprobs: list[float]


class Request(msgspec.Struct, frozen=True):
    """One completion asked for, in token ids. Its sequence carries the same id."""

    request_id: str
    prompt_ids: list[int]  # at least one id
    max_tokens: int  # prompt + max_tokens fits the context; 0 only computes the prompt (for its logprobs)
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()  # end of sequence among them, unless ignore_eos
    deadline: float | None = None  # monotonic seconds of the engine's process; then it ends, whatever state it is in
    key: str = ""  # the name of the API key that it came with: keys share the engine fairly, and no cached prefixes
    priority: int = 0  # of those that wait, the lowest begins first; it takes nothing from those that run
    cache_salt: str = ""  # shares the prefix cache with requests of the same salt only


class Event(msgspec.Struct, frozen=True):
    """What the engine reports of a request: new ids, and in the last event why it ended.

    Exactly one event of a request has a `finish_reason`. With "stop" the last id of `token_ids` is the stop id itself.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error": what happened, fit for a client
    code: ErrorCode | None = None  # with an error that is not a refusal
    logprobs: list[TokenLogprobs] = []  # one an id, where asked
    prompt_logprobs: list[TokenLogprobs] = []  # of the next prompt ids, from the second on, where asked
    num_cached: int = 0  # prompt ids that were found in the prefix cache; told with new ids


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """Opens a row in the ranks' tables. `known_ids` stand before the first entry's ids (cached prefix; else empty)."""

    seq: int
    sampling: SamplingParams
    known_ids: list[int]
    num_prompt: int = 0  # ids of the prompt; those after it count as generated


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's share of a step: its ids from position `start` on, and the blocks it gains.

    Empty `ids` mean "your last token" (one id, sampled by an earlier step that the engine has not seen yet).
    """

    seq: int
    start: int  # position of the first id = ids already in the cache
    ids: list[int]
    new_blocks: list[int]  # appended to the sequence's block table
    sample: bool  # False for a prefill chunk that is not the last
    prompt_logprobs: bool = False  # wanted of the ids that follow each of these ids in the prompt
    next_prompt_id: int | None = None  # with prompt_logprobs: what follows the last of them; None where the prompt ends


class StepBatch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One step of one lane, the same to all ranks: differences only."""

    epoch: int
    step: int  # counted over all lanes; every stage executes steps in this order
    lane: int
    opened: list[NewSequence]
    closed: list[int]  # sequences whose rows are dropped before this step runs
    entries: list[Entry]  # empty when rows are only dropped
    seen: int = -1  # the last step whose result the engine had when it made this one


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Ask a rank to leave its loop."""

    epoch: int


class Fence(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tell a rank's side thread that the epoch is over: it logs the stacks, and ends whatever the rank waits for."""

    epoch: int


class Check(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Ask a rank to look whether its weights are still numbers; it fails when they are not."""

    epoch: int


class Bucket(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One shape of a step that runs over static buffers; a smaller step is padded up to it."""

    num_tokens: int
    num_seqs: int  # request slots: sequences that it holds
    num_blocks: int  # of each sequence's block table
    is_decode: bool  # every sequence has one token


class Capture(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Ask a rank to capture one shape of a step in a graph, in its place among the steps; it answers with Captured."""

    epoch: int
    bucket: Bucket


class Captured(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """From every rank: the end of a capture."""

    epoch: int
    bucket: Bucket
    reason_not: str | None = None  # why steps of this shape go on without a graph; None: it is captured


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """From shard 0 of the last stage: for each entry that sampled, in order, the ids it gained.

    NOT_A_NUMBER stands where the logits are not finite, GRAMMAR_FAILED or NO_VOCABULARY where a grammar cannot be
    followed. No id came where the grammar is not compiled yet. There may be several ids an entry: speculation would
    need that.
    """

    epoch: int
    step: int
    token_ids: list[list[int]]
    # As token_ids; an inner list is empty where its request did not ask, the outer one where no request did
    logprobs: list[list[TokenLogprobs]] = []
    prompt_logprobs: list[list[TokenLogprobs]] = []  # one list for each entry that wanted them, in order


class Substitution(msgspec.Struct, frozen=True):
    """What a rank's backend computes by something of its own, in how many places, and why not in others."""

    what: str  # for instance "rms_norm"
    count: int  # places in the model where it is used
    reason_not: str | None = None  # why it is not used, or not everywhere; None: it is, everywhere


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Sent by every rank every HEARTBEAT_S, from a side thread; see patience."""

    epoch: int
    step: int  # last step begun
    seconds: dict[str, float] = {}  # by phase, since it joined; see PhaseClock
    op: int = 0  # collectives and hops begun since it joined


class RankFailure(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's report that it cannot go on."""

    epoch: int
    step: int
    error: str
    op: int = 0
    is_echo: bool = False  # it cannot go on because of another rank


ToRank = StepBatch | Shutdown | Fence | Check | Capture
FromRank = StepResult | Heartbeat | RankFailure | Captured
