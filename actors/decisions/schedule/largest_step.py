"""The step that takes the most memory of all that a scheduler can form: run once, to size the KV cache by it."""

from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.settings import PROMPT_LOGPROBS_CHUNK, SchedulerSettings
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch

_FIRST_SEQ = -2  # numbers from here downwards are given to no sequence by the engine
_NUM_TOP = 20
# What makes sampling take the most: everything that is computed over whole rows of logits
_SAMPLING = SamplingParams(
    temperature=1.0, seed=0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=_NUM_TOP, allowed_ids=[0]
)
_SAMPLING_OF_PROMPT = SamplingParams(temperature=1.0, seed=0, logprobs=_NUM_TOP, prompt_logprobs=_NUM_TOP)
_CONTEXT_PER_TOKEN = 16  # the longest context of a step, beside its tokens


def largest_step(
    settings: SchedulerSettings, max_model_len: int, num_tokens: int, lane: int
) -> tuple[StepBatch, StepBatch]:
    """(A lane's step of `num_tokens` tokens, or as many as there can be; the step that closes its sequences).

    Every sequence samples. The first brings the prompt ids whose log-probabilities are wanted, the next ones long
    chunks of prompts, and the others a token each. All blocks are block 0, so that a cache of one block is enough: what
    is computed means nothing.
    """
    room = max_model_len - 1
    num_seqs = min(settings.max_num_seqs, num_tokens)
    left, opened, entries = num_tokens - num_seqs, list[NewSequence](), list[Entry]()
    for index in range(num_seqs):
        is_prompt = index == 0
        num_ids = 1 + min(left, min(room, PROMPT_LOGPROBS_CHUNK if is_prompt else room) - 1)
        left -= num_ids - 1
        start = 0 if is_prompt else max(0, min(room, _CONTEXT_PER_TOKEN * num_tokens) - num_ids)
        if num_ids == 1:
            start = max(0, min(room, num_tokens) - 1)
        seq, blocks = _FIRST_SEQ - index, [0] * num_blocks_for(start + num_ids, settings.block_size)
        sampling = _SAMPLING_OF_PROMPT if is_prompt else _SAMPLING
        opened.append(NewSequence(seq, sampling, [0] * start, start + num_ids))
        entries.append(Entry(seq, start, [0] * num_ids, blocks, sample=True, prompt_logprobs=is_prompt))
    closed = [new.seq for new in opened]
    return StepBatch(0, -4, lane, opened, [], entries), StepBatch(0, -3, lane, [], closed, [])
