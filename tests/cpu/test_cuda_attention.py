"""Paged attention on CUDA: when the kernel is chosen, how it is called, and that a wrong kernel is not used.

Torch's kernel runs on CUDA only. Here a function that does what its documentation says stands for it.
"""

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.decisions.model.plan import Plan
from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.attention.metadata import LayerCache, PagedRows
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda import attention
from actors.tensors.backends.cuda.attention import CUDAAttention, VarlenKernel, choose_kernels, kernel_fault
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.cuda.decode import CUDADecoder
from actors.tensors.backends.cuda.varlen_support import KernelDevice, why_no_kernel
from actors.words.messages import Substitution

CPU = torch.device("cpu")
H100 = KernelDevice("cuda", 90)
SPEC = AttentionSpec("a", 8, 2, 16, 16)
worlds = runpy.run_path(str(Path(__file__).with_name("test_cuda_decoder.py")))


def documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """What torch.nn.attention.varlen.varlen_attn says it does, with the checks of its C++ side."""
    integers = (cu_seq_q, seqused_k, block_table, *([] if cu_seq_k is None else [cu_seq_k]))
    assert all(tensor.dtype == torch.int32 for tensor in integers) and block_table.stride(-1) == 1
    assert query.stride(-1) == 1 and seqused_k.is_contiguous() and cu_seq_q.is_contiguous()
    assert cu_seq_k is None or cu_seq_k.shape == cu_seq_q.shape
    assert block_table.shape[0] == seqused_k.shape[0] == len(cu_seq_q) - 1
    assert enable_gqa == (query.shape[1] != key.shape[2])
    out = torch.zeros_like(query)
    for seq, (first, end) in enumerate(zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False)):
        length = int(seqused_k[seq])
        assert 0 < end - first <= max_q and length <= max_k
        keys, values = (x[block_table[seq].long()].flatten(0, 1)[:length] for x in (key, value))
        groups = query.shape[1] // key.shape[2]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        at = torch.arange(length - (end - first), length)[:, None]  # the last tokens of the sequence
        places = torch.arange(length)[None, :]
        left, right = window_size
        seen = torch.ones(end - first, length, dtype=torch.bool)
        seen &= (places >= at - left) if left >= 0 else True
        seen &= (places <= at + right) if right >= 0 else True
        logits = torch.einsum("qhd,khd->hqk", query[first:end].float(), keys.float()) * scale
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, values.float()).to(query.dtype)
    return out


@pytest.mark.parametrize(
    ("change", "dtype", "block_size", "device", "reason"),
    [
        ({}, "bfloat16", 256, H100, None),
        ({}, "float16", 512, H100, None),
        ({"mask_spec": MaskSpec(window=5)}, "bfloat16", 256, H100, None),
        ({}, "bfloat16", 256, KernelDevice("cpu"), "not on cpu"),
        ({}, "bfloat16", 256, KernelDevice("cuda", 75), "this device has 7.5"),
        ({}, "float32", 256, H100, "not in float32"),
        ({"softcap": 30.0}, "bfloat16", 256, H100, "soft cap"),
        ({"has_sinks": True}, "bfloat16", 256, H100, "sinks"),
        ({"mask_spec": MaskSpec(chunk=64)}, "bfloat16", 256, H100, "chunks"),
        ({"value_dim": 8}, "bfloat16", 256, H100, "differ"),
        ({"key_dim": 20, "value_dim": 20}, "bfloat16", 256, H100, "multiple of 8"),
        ({"key_dim": 264, "value_dim": 264}, "bfloat16", 256, H100, "up to 256"),
        ({}, "bfloat16", 16, H100, "set cache.block_size"),
        ({}, "bfloat16", 16, KernelDevice("cuda", 90, "FA3"), None),
    ],
)
def test_the_kernel_is_chosen_for_what_it_can(
    change: dict[str, Any], dtype: str, block_size: int, device: KernelDevice, reason: str | None
) -> None:
    found = why_no_kernel(dataclasses.replace(SPEC, **change), dtype, block_size, device)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("mask_spec", [MaskSpec(), MaskSpec(window=1), MaskSpec(window=7), MaskSpec(window=1000)])
@pytest.mark.parametrize("implementation", [None, "FA3"])
def test_what_the_kernel_is_asked_is_what_is_meant(
    mask_spec: MaskSpec, implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    spec, kernel = dataclasses.replace(SPEC, mask_spec=mask_spec), VarlenKernel(mask_spec, implementation)
    for num_kv_heads in (2, 8):
        one = dataclasses.replace(spec, num_kv_heads=num_kv_heads)
        assert kernel_fault(kernel, one, torch.bfloat16, 16, CPU) is None
    wrong = VarlenKernel(MaskSpec(window=3), implementation)
    assert "differs by" in str(kernel_fault(wrong, spec, torch.bfloat16, 16, CPU))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *_, **__: _raise())
    assert "it fails on this device: no kernel image" in str(kernel_fault(kernel, spec, torch.bfloat16, 16, CPU))


def _raise() -> None:
    raise RuntimeError("no kernel image")


def test_why_there_is_no_kernel_is_said_once() -> None:
    """For all attentions together: this is what a rank logs, and what /cluster shows."""
    specs = [dataclasses.replace(SPEC, name=str(layer)) for layer in range(3)]
    reason = "it runs on CUDA, not on cpu (3 places)"
    assert choose_kernels(specs, torch.bfloat16, 256, CPU) == ({}, [Substitution("varlen_attention", 0, reason)])


def test_torch_takes_these_arguments() -> None:
    """Through the shapes that torch itself declares for it."""
    rows = PagedRows.decode(torch.zeros(3, 4, dtype=torch.int32), torch.ones(3, dtype=torch.int32), 256)
    on_meta = PagedRows(
        *(tensor.to("meta") for tensor in (rows.tables_SN, rows.lengths_S, rows.first_tokens_O, rows.first_keys_O)),
        rows.max_queries,
        rows.max_keys,
    )
    query, cache = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 8, 64), (5, 256, 2, 64)))
    for mask_spec in (MaskSpec(), MaskSpec(window=9)):
        out = VarlenKernel(mask_spec, None).attend(LayerCache(SPEC, cache, cache), query, on_meta, 0.1)
        assert (out.shape, out.dtype, out.is_meta) == (query.shape, query.dtype, True)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_prefill_and_decode_by_the_kernel_bring_the_same_ids(
    family: str,
    plan_of: Callable[..., Plan],
    checkpoints: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    chosen = Substitution("varlen_attention", 7)
    monkeypatch.setattr(
        attention,
        "choose_kernels",
        lambda specs, *_: ({spec.name: VarlenKernel(spec.mask_spec, None) for spec in specs}, [chosen]),
    )
    plan = plan_of(family, scheduler={"max_num_seqs": 5})
    run, world, make = worlds["run"], worlds["World"], worlds["make"]
    expected = run(world(3, plan.spec.vocab_size, 2), make(CPUBackend(CPU), plan, checkpoints(family)).launch, 25)
    runner = make(CUDABackend(CPU), plan, checkpoints(family))
    assert isinstance(runner.attention, CUDAAttention) and isinstance(runner.decoder, CUDADecoder)
    assert runner.attention._builder.mask_specs == frozenset(), "no masks are made for attentions that need none"
    assert len(runner.decoder.buckets.blocks) == 1
    assert chosen in runner.substitutions
    found = run(world(3, plan.spec.vocab_size, 2), runner.launch, 25)
    assert [step.token_ids for step in found] == [step.token_ids for step in expected]


def test_attentions_with_and_without_a_kernel_in_one_model(
    plan_of: Callable[..., Plan], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windowed layers of Qwen2 by the kernel, the others by gathers; whole tables where all rows are of one token."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)

    def choose(specs: list[AttentionSpec], *_: Any) -> tuple[dict[str, VarlenKernel], list[Substitution]]:
        windowed = {spec.name: VarlenKernel(spec.mask_spec, None) for spec in specs if spec.mask_spec.window}
        assert 0 < len(windowed) < len(specs)
        return windowed, []

    monkeypatch.setattr(attention, "choose_kernels", choose)
    plan = plan_of("qwen2", scheduler={"max_num_seqs": 5})
    run, world, make = worlds["run"], worlds["World"], worlds["make"]
    expected = run(world(4, plan.spec.vocab_size, 2), make(CPUBackend(CPU), plan, checkpoints("qwen2")).launch, 25)
    runner = make(CUDABackend(CPU), plan, checkpoints("qwen2"))
    assert runner.attention._builder.mask_specs == {MaskSpec()}
    found = run(world(4, plan.spec.vocab_size, 2), runner.launch, 25)
    assert [step.token_ids for step in found] == [step.token_ids for step in expected]


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
