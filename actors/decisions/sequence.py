"""One completion being generated: its ids, how far they are scheduled, and the blocks that hold them."""

from dataclasses import dataclass, field

from actors.decisions.blocks import BlockHash, next_hash, root_hash
from actors.words.messages import FinishReason, Request


@dataclass(eq=False)
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
    num_preemptions: int = 0
    num_prompt_logprobs: int = 0  # told already; a computation after a preemption says them again
    waiting_since: float | None = None  # monotonic seconds; None once the ranks have heard of it
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Ids generated and known."""
        return len(self.ids) - len(self.request.prompt_ids)

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
        return self.num_unscheduled > 1 or self.num_scheduled < len(self.request.prompt_ids)

    @property
    def wants_token(self) -> bool:
        """Whether one more sample, on top of those pending, could still be used."""
        return self.num_generated + self.num_pending < self.request.max_tokens

    def full_hashes(self, block_size: int) -> list[BlockHash]:
        """Names of all full blocks of the known ids, computed once."""
        while (len(self.hashes) + 1) * block_size <= len(self.ids):
            first = len(self.hashes) * block_size
            previous = self.hashes[-1] if self.hashes else root_hash(self.salt)
            self.hashes.append(next_hash(previous, self.ids[first : first + block_size]))
        return self.hashes
