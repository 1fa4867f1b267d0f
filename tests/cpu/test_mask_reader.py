"""The mask reader: windows and chunks are read from Transformers' own mask functions, other patterns are refused."""

from typing import Any

import pytest
import torch
from transformers import masking_utils as masks

from actors.decisions.model.spec import MaskSpec
from actors.tensors.model.mask_reader import read_mask
from actors.words.errors import UnsupportedModel


@pytest.mark.parametrize("max_position", [40, 4096, 10_000_000])
@pytest.mark.parametrize("size", [1, 2, 6, 37])
def test_windows_and_chunks_are_told_apart(size: int, max_position: int) -> None:
    padding = torch.zeros(1, dtype=torch.int64)
    assert read_mask(masks.sliding_window_causal_mask_function(size), max_position) == MaskSpec(window=size)
    expected = MaskSpec(chunk=size) if size > 1 else MaskSpec(window=1)  # a chunk of one is a window of one
    assert read_mask(masks.chunked_causal_mask_function(size, padding), max_position) == expected


@pytest.mark.parametrize("size", [8192, 1024, 131_072])
def test_large_ones_too(size: int) -> None:
    padding = torch.zeros(1, dtype=torch.int64)
    assert read_mask(masks.sliding_window_causal_mask_function(size), 10_485_760) == MaskSpec(window=size)
    assert read_mask(masks.chunked_causal_mask_function(size, padding), 10_485_760) == MaskSpec(chunk=size)


def test_what_is_wider_than_the_model_is_everything() -> None:
    assert read_mask(masks.causal_mask_function, 100) == MaskSpec()
    assert read_mask(masks.sliding_window_causal_mask_function(100), 100) == MaskSpec()


@pytest.mark.parametrize(
    "function",
    [
        masks.bidirectional_mask_function,
        lambda b, h, q, k: (k <= q) & (k % 2 == 0),
        lambda b, h, q, k: (k <= q) & (k >= q // 2),
        lambda b, h, q, k: (k <= q) & ((k > q - 5) | (k < 2)),
    ],
)
def test_other_patterns_are_refused(function: Any) -> None:
    with pytest.raises(UnsupportedModel, match="not supported"):
        read_mask(function, 200)


@pytest.mark.parametrize("mask_spec", [MaskSpec(), MaskSpec(window=5), MaskSpec(chunk=4), MaskSpec(5, 4)])
def test_first_key_is_the_earliest_that_is_seen(mask_spec: MaskSpec) -> None:
    for position in range(30):
        seen = [
            key
            for key in range(position + 1)
            if (mask_spec.window is None or key > position - mask_spec.window)
            and (mask_spec.chunk is None or key // mask_spec.chunk == position // mask_spec.chunk)
        ]
        assert mask_spec.first_key(position) == min(seen)
