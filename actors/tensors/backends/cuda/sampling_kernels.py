"""The Triton kernel that searches a row's whole vocabulary for what top_k and top_p keep, where candidates do not say.

A program a row; it leaves at once where the threshold is known. Sort keys are those of ranking.py, weights those of
vocabulary_search.py: integers, so that their sums have the same bits in any order.
"""

import torch
import triton
import triton.language as tl

from actors.tensors.sampling.ranking import NO_TOKEN
from actors.tensors.sampling.vocabulary_search import WEIGHT_BITS

_NO_TOKEN = tl.constexpr(NO_TOKEN)
_WEIGHT = tl.constexpr(float(1 << WEIGHT_BITS))  # of the best token
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_LAST_ID = tl.constexpr((1 << 32) - 1)
_TOKENS = 1024  # looked at together


@triton.jit
def _weigh(
    scores: tl.tensor, num_tokens: tl.tensor, best: tl.tensor, floor: tl.tensor, lowest: tl.tensor,
    IS_COUNT: tl.constexpr, TOKENS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What the tokens weigh, or how many they are, whose sort keys are at least `lowest` and at least `floor`."""
    total = floor * 0
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        score = tl.load(scores + token, mask=token < num_tokens, other=float("-inf"))
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        ascending = bits ^ ((bits >> 31) & _MAGNITUDE)
        key = (ascending.to(tl.int64) << 32) + (_LAST_ID - token.to(tl.int64))
        if IS_COUNT:
            weight = tl.full([TOKENS], 1, tl.int64)
        else:
            share = tl.exp(score.to(tl.float64) - best.to(tl.float64))
            share = tl.where(share >= 0, tl.minimum(share, 1.0), 0.0)  # NaN is not
            weight = (share * _WEIGHT).to(tl.int64)
        total += tl.sum(tl.where((token < num_tokens) & (key >= lowest) & (key >= floor), weight, 0), 0)
    return total


@triton.jit
def _reach(
    scores: tl.tensor, num_tokens: tl.tensor, best: tl.tensor, floor: tl.tensor, share: tl.tensor,
    IS_COUNT: tl.constexpr, ID_BITS: tl.constexpr, TOKENS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The highest sort key with which the tokens at least as good weigh `share`: bit by bit, of score and id."""
    score = floor * 0 - 2147483648
    step = floor * 0 + 2147483648
    for _ in range(32):
        weight = _weigh(scores, num_tokens, best, floor, (score + step) << 32, IS_COUNT, TOKENS)
        score = tl.where(weight >= share, score + step, score)
        step = step >> 1
    key = (score << 32) + (_LAST_ID - ((1 << ID_BITS) - 1))
    step = floor * 0 + (1 << (ID_BITS - 1))
    for _ in range(ID_BITS):
        weight = _weigh(scores, num_tokens, best, floor, key + step, IS_COUNT, TOKENS)
        key = tl.where(weight >= share, key + step, key)
        step = step >> 1
    return key


@triton.jit
def _lowest_kept(
    scores: tl.tensor, best: tl.tensor, is_known: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, lowest: tl.tensor,
    num_tokens: tl.tensor, ID_BITS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """Scores [U, V] float32, best [U] float32, is_known [U], top_k [U] int64, top_p [U] float64 → lowest [U] int64."""
    row = tl.program_id(0)
    if tl.load(is_known + row) == 0:
        scores += row.to(tl.int64) * num_tokens
        best_score, count, share = tl.load(best + row), tl.load(top_k + row), tl.load(top_p + row)
        floor = count * 0 + _NO_TOKEN
        if count < num_tokens:
            floor = _reach(scores, num_tokens, best_score, floor, count, True, ID_BITS, TOKENS)
        if share <= 1.0:
            total = _weigh(scores, num_tokens, best_score, floor, floor, False, TOKENS)
            asked = tl.ceil(total.to(tl.float64) * share).to(tl.int64)
            asked = tl.maximum(tl.minimum(asked, total), 1)
            floor = _reach(scores, num_tokens, best_score, floor, asked, False, ID_BITS, TOKENS)
        tl.store(lowest + row, floor)


def lowest_kept(
    scores_UV: torch.Tensor,
    best_U1: torch.Tensor,
    is_known_U1: torch.Tensor,
    top_k_U1: torch.Tensor,
    top_p_U1: torch.Tensor,
) -> torch.Tensor:
    """As Vocabulary.lowest_kept → [U, 1], for a vocabulary that is here whole; where it is known, anything."""
    num_rows, num_tokens = scores_UV.shape
    lowest_U1 = torch.empty_like(top_k_U1)
    _lowest_kept[(num_rows,)](
        scores_UV.contiguous(), best_U1, is_known_U1, top_k_U1, top_p_U1, lowest_U1, num_tokens,
        ID_BITS=max(1, (num_tokens - 1).bit_length()), TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip
    return lowest_U1
