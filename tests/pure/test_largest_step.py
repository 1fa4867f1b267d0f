"""The largest step: as many tokens and rows as a scheduler can give to one, in sequences that its limits allow."""

import pytest

from actors.decisions.schedule.largest_step import largest_step
from actors.decisions.schedule.settings import PROMPT_LOGPROBS_CHUNK, SchedulerSettings


@pytest.mark.parametrize("max_num_seqs", [1, 4, 64])
@pytest.mark.parametrize("max_model_len", [2, 40, 512, 131072])
@pytest.mark.parametrize("num_tokens", [64, 300, 8192])
def test_it_is_as_large_as_limits_allow(max_num_seqs: int, max_model_len: int, num_tokens: int) -> None:
    settings = SchedulerSettings(16, max_num_seqs, max(num_tokens, max_num_seqs), num_lanes=2)
    step, closing = largest_step(settings, max_model_len, num_tokens, lane=1)
    longest = [min(max_model_len - 1, PROMPT_LOGPROBS_CHUNK), *[max_model_len - 1] * (max_num_seqs - 1)]
    counts = [len(entry.ids) for entry in step.entries]
    assert sum(counts) == min(num_tokens, sum(longest))
    assert len(step.entries) == min(max_num_seqs, num_tokens)
    assert all(entry.sample and count <= most for entry, count, most in zip(step.entries, counts, longest, strict=True))
    for new, entry in zip(step.opened, step.entries, strict=True):
        assert (new.seq, len(new.known_ids)) == (entry.seq, entry.start)
        assert entry.start + len(entry.ids) < max_model_len
        assert len(entry.new_blocks) * settings.block_size >= entry.start + len(entry.ids)
        assert entry.seq < -1, "the engine's numbers, and that of warming up, are others"
    assert [entry.prompt_logprobs for entry in step.entries] == [True, *[False] * (len(step.entries) - 1)]
    assert closing.closed == [new.seq for new in step.opened]
    assert step.lane == closing.lane == 1


def test_of_long_prompts_one_stands_far_behind() -> None:
    settings = SchedulerSettings(16, 8, 2048, num_lanes=1)
    step, _ = largest_step(settings, 131072, 2048, lane=0)
    assert max(entry.start + len(entry.ids) for entry in step.entries) == 16 * 2048
