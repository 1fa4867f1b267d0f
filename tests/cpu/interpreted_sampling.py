"""What test_triton.py runs in a process whose kernels Triton interprets: the search of a whole vocabulary."""

from unittest import mock

import pytest
import torch

from actors.tensors.backends.cuda import sampling_kernels, vocabulary_search
from actors.tensors.sampling.logits_processors import SamplingRow
from actors.tensors.sampling.truncation import Truncation, truncation_thresholds
from actors.tensors.sampling.vocabulary_search import Vocabulary
from actors.words.messages import SamplingParams
from cluster.collectives.interface import LoneShard

UNUSED, NONE = 1 << 62, float("inf")
pytestmark = pytest.mark.timeout(300)


def test_it_keeps_what_is_found_by_counting() -> None:
    """Peaked and flat rows, many equal scores, banned tokens, and rows whose threshold is known."""
    size = 900
    scores_UV = 3 * torch.randn(7, size, generator=torch.Generator().manual_seed(0))
    scores_UV[1] = 1.0
    scores_UV[2] = scores_UV[2].round()
    scores_UV[3, :100] = float("-inf")
    cuts = [(UNUSED, 0.999), (UNUSED, 0.499), (300, 0.9), (700, 0.3), (850, NONE), (1, NONE), (UNUSED, 0.9)]
    top_k_U1, top_p_U1 = (torch.tensor([[cut[i]] for cut in cuts]) for i in (0, 1))
    given = top_k_U1, top_p_U1.double()
    best_U1 = scores_UV.amax(1, keepdim=True)
    is_known_U1 = torch.tensor([[False]] * 6 + [[True]])
    expected_U1 = Vocabulary(scores_UV, best_U1, 0, LoneShard()).lowest_kept(*given, size, has_top_k=True)
    found_U1 = sampling_kernels.lowest_kept(scores_UV, best_U1, is_known_U1, *given)
    assert found_U1[:6].tolist() == expected_U1[:6].tolist()


def test_a_kernel_that_keeps_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device, lowest_kept = torch.device("cpu"), sampling_kernels.lowest_kept
    assert vocabulary_search.try_search(device) is lowest_kept
    monkeypatch.setattr(sampling_kernels, "lowest_kept", lambda *given: lowest_kept(*given[:-1], given[-1] * 0.99))
    assert not callable(vocabulary_search.try_search(device))


def test_a_shard_with_the_whole_vocabulary_is_searched_by_the_kernel() -> None:
    """Thresholds are those of the search in plain torch; min_p comes on top."""
    scores_RV = torch.randn(4, 600, generator=torch.Generator().manual_seed(1)) * 0.1
    fields = ({"top_p": 0.9}, {"top_p": 0.01}, {"top_k": 400, "top_p": 0.7}, {"top_p": 0.99, "min_p": 0.9})
    rows = [SamplingRow(SamplingParams(1.0, 0, **each), 0) for each in fields]
    given = scores_RV, Truncation.of(rows, lambda host: host), LoneShard(), (0, 600), 600, True
    with mock.patch.object(sampling_kernels, "lowest_kept", wraps=sampling_kernels.lowest_kept) as kernel:
        found_R1 = truncation_thresholds(*given, sampling_kernels.lowest_kept)
    assert kernel.call_count == 1
    assert found_R1.tolist() == truncation_thresholds(*given, None).tolist()
