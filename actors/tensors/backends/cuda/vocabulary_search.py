"""Tries the Triton kernel that searches a whole vocabulary for top_k and top_p against the search in plain torch."""

from collections.abc import Callable

import torch

from actors.tensors.backends.cuda.attention_trial import why_no_kernels
from actors.tensors.backends.trial import Reason, difference, random
from actors.tensors.sampling.ranking import scores_of, sort_keys_of
from actors.tensors.sampling.vocabulary_search import Vocabulary
from cluster.collectives.interface import LoneShard

Search = Callable[..., torch.Tensor]  # see Backend.lowest_kept
_NUM_TOKENS = 700
_UNUSED = 1 << 62  # top_k
_CUTS = ((_UNUSED, 0.9), (300, float("inf")), (500, 0.5), (_UNUSED, 0.999))


def try_search(device: torch.device) -> Search | Reason:
    """The kernel, or why it is not used; some of the scores that it is tried on are equal."""
    reason_not = why_no_kernels(device)
    if reason_not is not None:
        return reason_not
    from actors.tensors.backends.cuda.sampling_kernels import lowest_kept

    scores_UV = random(len(_CUTS), _NUM_TOKENS, dtype=torch.float32, device=device, seed=1)
    scores_UV[1:3] = scores_UV[1:3].mul(4).round().div(4)
    best_U1 = scores_UV.amax(1, keepdim=True)
    top_k_U1 = torch.tensor([[top_k] for top_k, _ in _CUTS], device=device)
    top_p_U1 = torch.tensor([[top_p] for _, top_p in _CUTS], dtype=torch.float64, device=device)
    sort_keys_UV = sort_keys_of(scores_UV, torch.arange(_NUM_TOKENS, device=device))

    def num_kept(lowest_U1: torch.Tensor) -> torch.Tensor:
        return (sort_keys_UV >= lowest_U1).sum(1).float() + scores_of(lowest_U1)[:, 0]

    def expected() -> torch.Tensor:
        vocabulary = Vocabulary(scores_UV, best_U1, 0, LoneShard())
        return num_kept(vocabulary.lowest_kept(top_k_U1, top_p_U1, _NUM_TOKENS, has_top_k=True))

    def found() -> torch.Tensor:
        is_known_U1 = torch.zeros_like(best_U1, dtype=torch.bool)
        return num_kept(lowest_kept(scores_UV, best_U1, is_known_U1, top_k_U1, top_p_U1))

    return difference(expected, found) or lowest_kept
