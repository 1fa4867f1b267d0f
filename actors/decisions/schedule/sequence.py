"""One completion being generated: its ids, how far they are scheduled, and the blocks that hold them."""

import secrets
from dataclasses import dataclass, field

import msgspec

from actors.decisions.schedule.blocks import BlockHash, next_hash, root_hash
from actors.words.messages import Entry, FinishReason, Request, TokenLogprobs


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's journal and its place in the schedule. `ids` is all that a replay needs."""

    seq: int  # its number in the ranks' tables
    request: Request
    salt: str = ""
    ids: list[int] = field(default_factory=list)  # prompt, then generated
    lane: int | None = None  # None while it waits
    num_scheduled: int = 0  # positions submitted to the ranks since the row was opened
    num_pending: int = 0  # samples submitted whose ids are not known yet
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks of known ids
    num_named: int = 0  # of its blocks, named by their contents
    is_open: bool = False  # the ranks have a row for it
    num_prompt_logprobs: int = 0  # told already; whatever is computed again says them again
    waiting_since: float | None = None  # monotonic seconds; None once the ranks have heard of it
    finish_reason: FinishReason | None = None
    suspect_until: int = -1  # it may end ranks, and runs alone, until it has more ids; see Quarantine

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Ids generated and known."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def is_suspect(self) -> bool:
        """Whether it must run alone."""
        return len(self.ids) <= self.suspect_until

    @property
    def num_unscheduled(self) -> int:
        """Known ids that no step has taken yet: the rest of a prefill, or 1 between two decode steps."""
        return max(0, len(self.ids) - self.num_scheduled)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt ids are left whose logprobs were asked for and not told."""
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
        return self.wants_token and (self.num_unscheduled == 1 or 0 < self.num_pending < depth)

    def full_hashes(self, block_size: int) -> list[BlockHash]:
        """Names of all full blocks of the known ids, computed once."""
        while (len(self.hashes) + 1) * block_size <= len(self.ids):
            first = len(self.hashes) * block_size
            previous = self.hashes[-1] if self.hashes else root_hash(self.salt)
            self.hashes.append(next_hash(previous, self.ids[first : first + block_size]))
        return self.hashes

    def place_after(self, entry: Entry) -> int:
        """How many ids it needs to have got past an entry: no id is gained before the prompt is computed."""
        return max(len(self.request.prompt_ids), entry.start + (len(entry.ids) or 1))

    def start_over(self) -> None:
        """The ranks know nothing of it any more: what it has is its ids, and what was told of them."""
        self.lane, self.is_open = None, False
        self.blocks, self.num_scheduled, self.num_pending, self.num_named = [], 0, 0, 0

    def take_unreported(self, entry: Entry, told: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Of an entry's prompt logprobs (of positions start + 1 on) those that no earlier computation told."""
        unreported = told[self.num_prompt_logprobs - entry.start :] if told else []
        self.num_prompt_logprobs += len(unreported)
        return unreported

    def accept(self, entry: Entry, ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """Append what an entry sampled, up to a stop id → what was appended, and why it ends if it does."""
        request, accepted = self.request, 0
        for token in ids:
            accepted += 1
            self.ids.append(token)
            if token in request.stop_token_ids and self.num_generated > request.sampling.min_tokens:
                return ids[:accepted], "stop"
        is_prompt_done = entry.start + (len(entry.ids) or 1) >= len(request.prompt_ids)
        return ids[:accepted], "length" if is_prompt_done and self.num_generated >= request.max_tokens else None


def completed(request: Request) -> Request:
    """With what a replay needs: a seed where it draws, and the ids that min_tokens forbids."""
    sampling = request.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
    if sampling.min_tokens > 0:
        sampling = msgspec.structs.replace(sampling, banned_ids=sorted(request.stop_token_ids))
    return msgspec.structs.replace(request, sampling=sampling)
