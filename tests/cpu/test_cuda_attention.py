"""Paged attention on CUDA where there are no kernels: said once, and all masks are made. The kernels' own tests are in
test_triton.py."""

import dataclasses
import importlib
import sys

import pytest
import torch

from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.words.messages import Substitution

SPEC = AttentionSpec("a", 8, 2, 16, 16)


def test_why_there_is_no_kernel_is_said_once() -> None:
    """For all attentions together: this is what a rank logs, and what /cluster shows."""
    specs = [dataclasses.replace(SPEC, name=str(layer), mask_spec=MaskSpec(layer or None)) for layer in range(3)]
    attention = CUDABackend(torch.device("cpu")).attention(specs, torch.bfloat16, 16)
    assert attention.substitutions == [], "nothing is tried before it is asked for"
    attention.choose_kernels()
    assert attention.substitutions == [Substitution("paged_attention", 0, "it runs on CUDA, not on cpu (3 places)")]
    assert attention._builder.mask_specs == {MaskSpec(), MaskSpec(1), MaskSpec(2)}  # type: ignore[attr-defined]


def test_it_goes_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU installs have none: it is imported nowhere but where it is used, and that it is missing is said."""
    for name in [name for name in sys.modules if name.startswith("actors.tensors.backends.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    backend = importlib.import_module("actors.tensors.backends.cuda.backend").CUDABackend(torch.device("cpu"))
    attention = backend.attention([SPEC], torch.bfloat16, 16)
    attention.choose_kernels()
    (found,) = attention.substitutions
    assert found.count == 0 and "Triton is not installed" in str(found.reason_not)


@pytest.mark.parametrize("mask_spec", [MaskSpec(), MaskSpec(7), MaskSpec(chunk=8), MaskSpec(window=5, chunk=8)])
def test_first_keys_of_many_positions_are_those_of_each_one(mask_spec: MaskSpec) -> None:
    def is_seen(key: int, position: int) -> bool:
        in_window = mask_spec.window is None or position - key < mask_spec.window
        return in_window and (mask_spec.chunk is None or key // mask_spec.chunk == position // mask_spec.chunk)

    positions = torch.arange(50)
    firsts = [next(key for key in range(50) if is_seen(key, position)) for position in range(50)]
    assert [mask_spec.first_key(position) for position in range(50)] == firsts
    assert mask_spec.first_key(positions).tolist() == firsts
    assert mask_spec.first_key(positions.numpy()).tolist() == firsts
