"""The limits that a scheduler keeps to; the plan holds them."""

from dataclasses import dataclass

PROMPT_LOGPROBS_CHUNK = 256  # prompt ids of a step with logprobs: bounds the logits [ids, vocabulary rows]


@dataclass(frozen=True)
class SchedulerSettings:
    """Limits of one gang. How many blocks its ranks have room for is known only once the weights are loaded."""

    block_size: int  # tokens
    max_num_seqs: int  # sequences that hold blocks at the same time
    max_num_batched_tokens: int  # tokens of one step; at least max_num_seqs
    num_lanes: int
    depth: int = 1  # steps in flight of one lane
    prefix_cache: bool = True
