"""One completion being generated: its ids, how far they are scheduled, and the blocks that hold them."""

import secrets
from dataclasses import dataclass, field

import msgspec

from actors.decisions.against_grammar import against_grammar
from actors.decisions.schedule.blocks import BlockHash, next_hash, root_hash
from actors.words.messages import (
    GRAMMAR_FAILED,
    NO_VOCABULARY,
    NOT_A_NUMBER,
    Entry,
    ErrorCode,
    FinishReason,
    Request,
    TokenLogprobs,
)  # fmt: skip

FAILURES: dict[int, tuple[str, ErrorCode]] = {  # what stands in place of an id: the error, and its kind
    NOT_A_NUMBER: ("the model's logits are not finite", "numerical_error"),
    GRAMMAR_FAILED: ("its grammar or schema is too complex to be followed; make it simpler", "grammar_error"),
    NO_VOCABULARY: (
        "the ranks cannot read the tokenizer, which grammars need; see their log",
        "no_grammars",
    ),
}


@dataclass(eq=False, slots=True)
class Sequence:
    """The state of a request in the scheduler. A replay after a lost gang needs `ids` and the request only.

    Raises ValueError for a request with a grammar and what contradicts it.
    """

    seq: int  # its number in the ranks' tables
    request: Request
    ids: list[int] = field(default_factory=list)  # prompt, then generated
    lane: int | None = None  # None while it waits
    num_scheduled: int = 0  # positions submitted to the ranks since the row was opened
    num_pending: int = 0  # samples submitted whose ids are not known yet
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks of known ids
    num_hashed: int = 0  # of its blocks: the pool knows the hash of their contents
    is_open: bool = False  # the ranks have a row for it
    may_run_ahead: bool = True  # not before the first id of its row, if that may fail to come; see `accept`
    num_prompt_logprobs: int = 0  # already reported; what is computed again brings them again
    waiting_since: float | None = None  # monotonic seconds; None once a step with it was submitted
    num_cached: int = 0  # prompt ids whose KV blocks were found when it first began to run
    finish_reason: FinishReason | None = None
    suspect_until: int = -1  # it must run alone until it has more ids than this; see Quarantine
    is_charged: bool = False  # its prompt counts against its key

    def __post_init__(self) -> None:
        _check_grammar(self.request)
        self.ids = list(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Ids generated and known."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def has_begun(self) -> bool:
        """Whether a step with it was ever submitted."""
        return self.waiting_since is None

    @property
    def is_suspect(self) -> bool:
        """Whether it must run alone."""
        return len(self.ids) <= self.suspect_until

    @property
    def num_unscheduled(self) -> int:
        """Known ids that no step has taken yet: the rest of a prefill, or 1 between two decode steps."""
        return max(0, len(self.ids) - self.num_scheduled)

    @property
    def num_never_computed(self) -> int:
        """Prompt ids that count against its key, and that no step has taken."""
        if not self.is_charged or (self.has_begun and not self.is_open):
            return 0
        return max(0, len(self.request.prompt_ids) - self.num_scheduled)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logprobs of prompt ids were asked for and are not all reported."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and self.num_prompt_logprobs < len(self.request.prompt_ids) - 1

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the one id of a decode step is still to be computed."""
        scheduled = self.num_scheduled
        return len(self.ids) - scheduled > 1 or scheduled < len(self.request.prompt_ids)

    @property
    def wants_token(self) -> bool:
        """Whether one more sample, on top of those pending, could still be used."""
        return self.num_generated + self.num_pending < self.request.max_tokens

    def can_decode(self, depth: int) -> bool:
        """Whether a step may take its next token, or the one after those pending, of which `depth` are allowed."""
        depth = depth if self.may_run_ahead else 1
        return self.wants_token and (self.num_unscheduled == 1 or 0 < self.num_pending < depth)

    def full_hashes(self, block_size: int) -> list[BlockHash]:
        """The hashes of all full blocks of the known ids, each computed once."""
        while (len(self.hashes) + 1) * block_size <= len(self.ids):
            first = len(self.hashes) * block_size
            request = self.request
            previous = self.hashes[-1] if self.hashes else root_hash(request.key, request.cache_salt)
            self.hashes.append(next_hash(previous, self.ids[first : first + block_size]))
        return self.hashes

    def num_ids_after(self, entry: Entry) -> int:
        """How many ids it has once it is past an entry: at least its prompt, before which it gains none."""
        return max(len(self.request.prompt_ids), entry.start + (len(entry.ids) or 1))

    def open_row(self) -> None:
        """Note that the ranks get a row for it, and begin to compile its grammar if it has one."""
        self.is_open, self.may_run_ahead = True, self.request.sampling.grammar is None

    def start_over(self) -> None:
        """Forget what the ranks held of it. Its ids stay, and how many prompt logprobs were reported."""
        self.lane, self.is_open = None, False
        self.blocks, self.num_scheduled, self.num_pending, self.num_hashed = [], 0, 0, 0

    def take_unreported(self, entry: Entry, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """The part of an entry's prompt logprobs (of positions start + 1 on) that no event has reported yet."""
        unreported = logprobs[self.num_prompt_logprobs - entry.start :] if logprobs else []
        self.num_prompt_logprobs += len(unreported)
        return unreported

    def accept(self, entry: Entry, ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """Append what an entry sampled, up to a stop id → (what was appended, why the sequence ends, if it does).

        No ids of an entry that samples: its grammar is not compiled yet, and its last token is computed once more.
        """
        request, accepted = self.request, 0
        if ids:
            self.may_run_ahead = True
        elif entry.sample and self.is_open:
            self.num_scheduled -= 1
        for token in ids:
            accepted += 1
            self.ids.append(token)
            if token in request.stop_token_ids and self.num_generated > request.sampling.min_tokens:
                return ids[:accepted], "stop"
        is_prompt_done = entry.start + (len(entry.ids) or 1) >= len(request.prompt_ids)
        return ids[:accepted], "length" if is_prompt_done and self.num_generated >= request.max_tokens else None


def _check_grammar(request: Request) -> None:
    if field := against_grammar(request):
        raise ValueError(f"{field}: contradicts the grammar, which says itself where its text ends and what it is")


def completed(request: Request) -> Request:
    """The request with what a replay needs: a seed where it samples, and its stop ids where ranks must know them."""
    sampling = request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
    if sampling.min_tokens > 0 or sampling.grammar is not None:
        sampling = msgspec.structs.replace(sampling, stop_ids=sorted(request.stop_token_ids))
    return msgspec.structs.replace(request, sampling=sampling)
