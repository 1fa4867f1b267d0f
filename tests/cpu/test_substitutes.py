"""Substitutes: modules that compute the same are replaced, as numbers show; others stay, and a reason is given."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    HeliumConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama_model

from actors.decisions.model.plan import Plan, make_plan
from actors.remote.meeting import Assignment
from actors.remote.rank import Rank
from actors.tensors.backend import Backend
from actors.tensors.backends.cpu import gemm, module_kernels
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cpu.llama.attention import KernelAttention
from actors.tensors.backends.cpu.module_kernels import KernelGatedMLP, KernelRMSNorm
from actors.tensors.backends.forms import uses_rotary
from actors.tensors.backends.trial import Account, Deviation, difference
from actors.tensors.model.linear import MergedColwise, MergedPart
from actors.tensors.model.parallel_layers import ColwiseLinear, ParallelLinear, rebase
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch, Substitution
from cluster.collectives.interface import LoneShard
from configs.config import Config

BACKEND = CPUBackend(torch.device("cpu"))
TYPES = [torch.float32, torch.bfloat16]
SIZES = {
    "hidden_size": 192, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 3, "vocab_size": 160, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
needs_panels = pytest.mark.skipif(
    gemm.why_not(torch.empty(32, 2, dtype=torch.bfloat16)) is not None,
    reason="this CPU has no AVX-512 dot product of bfloat16, or has AMX, which is faster",
)


class Alone:
    stage = LoneShard()
    previous = next = feedback = None


# Modules by themselves


def merge(*layers: nn.Linear) -> MergedColwise:
    """Let linear layers be one product, as StageModel.prepare does."""
    placed: list[ParallelLinear] = [rebase(layer, ColwiseLinear).set_group(LoneShard()) for layer in layers]
    method = BACKEND.linear_method([layer.weight for layer in placed])
    assert method is not None
    merged = MergedColwise(method, [len(layer.weight) for layer in placed], [layer.bias for layer in placed])
    for index, layer in enumerate(placed):
        layer.hand_over(MergedPart(merged, index))
    return merged


def small_llama(**fields: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, "num_hidden_layers": 1, "_attn_implementation": "eager", **fields})


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_a_layer_of_substitutes_computes_the_same(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    config = small_llama(attention_bias=has_bias, mlp_bias=has_bias)
    layer = llama_model.LlamaDecoderLayer(config, 0).to(dtype).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    x, angles = torch.randn(1, 5, 32).to(dtype), torch.rand(1, 5, 8)
    embeddings = angles.cos().to(dtype), angles.sin().to(dtype)
    mask = torch.full((5, 5), float("-inf"), dtype=dtype).triu(1)
    expected = layer(x, position_embeddings=embeddings, attention_mask=mask)
    attention, mlp = layer.self_attn, layer.mlp
    merge(attention.q_proj, attention.k_proj, attention.v_proj)
    merge(mlp.gate_proj, mlp.up_proj)
    assert module_kernels.substitute_mlp(mlp, 32, dtype) is None
    assert module_kernels.substitute_norm(layer.input_layernorm) is None
    assert uses_rotary(attention)
    assert module_kernels.substitute_rotary(attention, 8, dtype) is None
    assert isinstance(layer.input_layernorm, KernelRMSNorm)
    assert isinstance(mlp, KernelGatedMLP)
    for _ in range(2):
        out = layer(x, position_embeddings=embeddings, attention_mask=mask)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_transformers_own_modules_stay_as_they_are() -> None:
    before = llama_model.LlamaAttention.forward.__globals__["apply_rotary_pos_emb"]
    attention = llama_model.LlamaAttention(small_llama(), 0)
    assert module_kernels.substitute_rotary(attention, 8, torch.float32) is None
    assert attention.forward.__globals__["apply_rotary_pos_emb"] is not before
    assert llama_model.LlamaAttention.forward.__globals__["apply_rotary_pos_emb"] is before
    assert type(llama_model.LlamaMLP(small_llama())) is llama_model.LlamaMLP


@torch.inference_mode()
def test_another_activation_keeps_its_mlp_and_a_step_that_broke_off_leaves_nothing_behind() -> None:
    mlp = llama_model.LlamaMLP(small_llama(hidden_act="gelu"))
    x, y = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    expected = mlp.down_proj(ACT2FN["gelu"](mlp.gate_proj(y)) * mlp.up_proj(y))
    merged = merge(mlp.gate_proj, mlp.up_proj)
    assert isinstance(module_kernels.substitute_mlp(mlp, 32, torch.float32), Deviation)
    assert type(mlp) is llama_model.LlamaMLP
    mlp(x)
    mlp.gate_proj(x)  # and then an error, before the other was asked
    torch.testing.assert_close(mlp(y), expected)
    assert not merged._parts


def test_layers_of_one_product_with_different_inputs_each_get_their_own() -> None:
    first, second, x = nn.Linear(8, 4), nn.Linear(8, 6), torch.randn(3, 8)
    with torch.inference_mode():
        expected = first(x), second(x + 1)
        merge(first, second)
        for _ in range(2):
            torch.testing.assert_close((first(x), second(x + 1)), expected)


@pytest.mark.parametrize("change", ["eps", "weight", "order"])
def test_a_norm_that_computes_something_else_is_left_alone(change: str) -> None:
    class Other(llama_model.LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if change == "eps":
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * self.variance_epsilon) * self.weight
            if change == "weight":
                return super().forward(x) + x * 0.02
            return super().forward(x - x.mean(-1, keepdim=True))

    norm = Other(64, eps=1e-5)
    nn.init.normal_(norm.weight)
    assert isinstance(module_kernels.substitute_norm(norm), Deviation)
    assert type(norm) is Other


class RoundsOnce(nn.RMSNorm):
    """Multiplies by its weight in float32, as Gemma 4 and OLMo 2 do; Llama rounds before it, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (self.weight.float() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


@pytest.mark.parametrize("kind", [RoundsOnce, llama_model.LlamaRMSNorm])
def test_a_norm_rounds_where_the_model_s_own_does(kind: type[nn.Module]) -> None:
    norm: Any = kind(300, eps=1e-5).bfloat16()
    with torch.inference_mode():
        norm.weight.copy_(1 + 0.3 * torch.randn(300, generator=torch.Generator().manual_seed(0)))
        x = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
        own = norm(x)
        assert module_kernels.substitute_norm(norm) is None
        assert norm.rounds_first == (kind is llama_model.LlamaRMSNorm)
        assert (norm(x) != own).float().mean() < 0.01, "but for the order of a sum"
        norm.rounds_first = not norm.rounds_first
        assert (norm(x) != own).float().mean() > 0.05


def test_an_account_adds_up() -> None:
    account = Account()
    assert account.put("norm", None)
    assert not account.put("norm", "too wide")
    assert not account.put("norm", "too wide")
    account.put("norm", Deviation(0.25))
    account.put("layer", None)
    reason = "too wide (2 places); it differs from the model's own by 0.25 of its size"
    assert account.entries() == [Substitution("norm", 1, reason), Substitution("layer", 1, None)]


def test_nan_and_errors_are_differences() -> None:
    def divide() -> float:
        return 1 / 0

    ones = torch.ones(4)
    assert difference(lambda: ones, lambda: ones) is None
    assert "nan" in str(difference(lambda: ones, lambda: ones * float("nan")))
    assert difference(lambda: ones, lambda: ones * 1.1) == Deviation(pytest.approx(0.1))
    assert difference(lambda: ones, lambda: ones * 1.1, lambda: ones * 0.9) is None
    assert "other shapes" in str(difference(lambda: ones, lambda: ones[:2]))
    assert "other dtypes" in str(difference(lambda: ones, ones.double))
    assert "it fails: ZeroDivisionError" in str(difference(lambda: ones, divide))
    assert "fails in the trial: ZeroDivisionError" in str(difference(divide, lambda: ones))


# Whole models


def checkpoint(folder: Path, config: PreTrainedConfig, dtype: str) -> Plan:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    asked: dict[str, Any] = {"model": {"source": str(folder), "dtype": dtype, "max_model_len": 64}}
    return make_plan(Config.model_validate(asked), read_spec(folder, dtype))


def logits_of(plan: Plan, folder: Path, substitutes: bool, backend: Backend = BACKEND) -> tuple[Any, list[Any]]:
    """The runner, and what it gives for one prompt and eight tokens that follow it, whatever it samples."""
    outputs: list[torch.Tensor] = []

    class Recording(Runner):
        def forward(self, *arguments: Any) -> torch.Tensor:
            outputs.append(super().forward(*arguments))
            return outputs[-1]

    runner = Recording(plan, 0, Alone(), backend)
    runner.load(folder, substitutes=substitutes)
    runner.allocate_cache(8)
    opened = [NewSequence(0, SamplingParams(temperature=0), [], 20)]
    runner.execute(StepBatch(0, 0, 0, opened, [], [Entry(0, 0, list(range(20)), [0, 1], True)]))
    for i in range(8):
        runner.execute(StepBatch(0, 1 + i, 0, [], [], [Entry(0, 20 + i, [7 * i + 3], [], True)]))
    return runner, outputs


def by_name(runner: Runner) -> dict[str, Substitution]:
    return {one.what: one for one in runner.substitutions}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen2Config(**SIZES)], ids=["llama", "qwen2"])
def test_attention_blocks_of_llama_s_form_are_computed_by_kernels(
    config: PreTrainedConfig, dtype: str, tmp_path: Path
) -> None:
    plan = checkpoint(tmp_path, config, dtype)
    runner, _ = logits_of(plan, tmp_path, substitutes=True)
    found = by_name(runner)
    assert found["attention_block"] == Substitution("attention_block", 3)
    assert found["gated_mlp"] == Substitution("gated_mlp", 3)
    assert found["rms_norm"] == Substitution("rms_norm", 7)
    assert runner.model is not None
    kinds = {type(module) for module in runner.model.module.modules()}
    assert kinds >= {KernelAttention, KernelGatedMLP, KernelRMSNorm}


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_small_blocks_are_tried_too(block_size: int, tmp_path: Path) -> None:
    plan = checkpoint(tmp_path, LlamaConfig(**SIZES), "float32")
    plan = dataclasses.replace(plan, scheduler=dataclasses.replace(plan.scheduler, block_size=block_size))
    runner = Runner(plan, 0, Alone(), BACKEND)
    runner.load(tmp_path)
    assert by_name(runner)["attention_block"] == Substitution("attention_block", 3)


def test_norms_inside_attention_leave_the_block_to_the_model_and_its_rotation_to_a_kernel(tmp_path: Path) -> None:
    plan = checkpoint(tmp_path, Qwen3Config(**SIZES), "float32")
    found = by_name(logits_of(plan, tmp_path, substitutes=True)[0])
    assert found["attention_block"].count == 0
    assert "differs from the model's own" in str(found["attention_block"].reason_not)
    assert found["rms_norm"] == Substitution("rms_norm", 13)  # two of each attention among them
    assert found["rotary"] == Substitution("rotary", 3)


@pytest.mark.parametrize(
    "config", [HeliumConfig(**{**SIZES, "hidden_size": 256}), Ernie4_5Config(**SIZES)], ids=["helium", "ernie"]
)
def test_a_rotation_that_turns_other_numbers_by_the_same_name_is_left_alone(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    plan = checkpoint(tmp_path, config, "float32")
    found = by_name(logits_of(plan, tmp_path, substitutes=True)[0])
    for what in ("attention_block", "rotary"):
        assert found[what].count == 0
        assert str(found[what].reason_not).startswith("it differs from the model's own by ")
        assert str(found[what].reason_not).endswith("(3 places)")


# Forced to step aside: the numbers are right all the same, and what stepped aside says why


def scaled(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A decoder layer's forward that is nearly Llama's: it adds what attention gives times 0.9."""
    normed = layer.input_layernorm(hidden_states)
    attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
    hidden_states = hidden_states + 0.9 * attended
    added: torch.Tensor = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    return added


ASIDE: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # config, dtype, what steps aside, why
    "another forward": ({}, "bfloat16", "decoder_layer", "differs from the model's own"),
    "a bias": ({"mlp_bias": True}, "bfloat16", "decoder_layer", "o_proj or down_proj has a bias"),
    "float32": ({}, "float32", "panel_packed_linear", "VDPBF16PS multiplies bfloat16, not float32"),
    "head_dim 80": ({"head_dim": 80}, "bfloat16", "paged_attention_avx512", "heads of 80 and 80 numbers do not fill"),
}


@needs_panels
@pytest.mark.parametrize("case", ASIDE)
def test_what_steps_aside_says_so_and_nothing_else_changes(case: str, tmp_path: Path) -> None:
    fields, dtype, what, why = ASIDE[case]
    plan = checkpoint(tmp_path, LlamaConfig(**{**SIZES, **fields}), dtype)
    with mock.patch.object(
        llama_model.LlamaDecoderLayer,
        "forward",
        scaled if case == "another forward" else llama_model.LlamaDecoderLayer.forward,
    ):
        _, expected = logits_of(plan, tmp_path, substitutes=False)
        runner, outputs = logits_of(plan, tmp_path, substitutes=True)
    entry = by_name(runner)[what]
    assert entry.count == 0
    assert why in str(entry.reason_not)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for output, one_by_one in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, one_by_one, rtol=tolerance, atol=tolerance)
        likeliest = int(one_by_one[0].argmax())
        assert output[0, likeliest] >= output[0].max() - tolerance * output[0].abs().max()


@pytest.mark.parametrize("asked", ["auto", "none"])
def test_a_rank_logs_each_substitution_once_and_none_leaves_them_out(
    asked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = checkpoint(tmp_path, Qwen3Config(**SIZES), "float32")
    config = Config.model_validate({"model": {"source": str(tmp_path)}, "device": "cpu", "substitutions": asked})
    rank = Rank(Assignment(config, plan, 0, "127.0.0.1", "cpu"))
    rank._groups = Alone()
    with caplog.at_level(logging.INFO):
        loaded = rank.load()
    lines = [record.getMessage() for record in caplog.records if "substituted" in record.getMessage()]
    assert len(lines) == len(loaded.substitutions)
    names = {one.what for one in loaded.substitutions}
    assert names == {"paged_attention_avx512"} if asked == "none" else len(names) > 4
    for line, one in zip(lines, loaded.substitutions, strict=True):
        assert f"{one.what}: substituted {one.count} times" in line
        assert one.reason_not is None or one.reason_not in line


@needs_panels
@pytest.mark.timeout(120)
def test_shards_that_exchange_over_gloo_run_layer_by_layer(
    tmp_path: Path, gang_on: Callable[..., Any], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, LlamaConfig(**SIZES), "bfloat16")
    asked = {"model": {"source": str(tmp_path)}, "parallel": {"tensor_parallel_size": 2}}
    plan = make_plan(Config.model_validate(asked), read_spec(tmp_path, "bfloat16"))
    opened = [NewSequence(0, SamplingParams(temperature=0), [], 20)]
    steps = [StepBatch(1, 0, 0, opened, [], [Entry(0, 0, list(range(20)), [0, 1], True)])]
    steps += [StepBatch(1, 1 + i, 0, [], [], [Entry(0, 20 + i, [7 * i + 3], [], True)]) for i in range(8)]
    found = {}
    for shares in (True, False):
        gang = gang_on(plan, tmp_path, "cpu", shares)
        found[shares] = [gang.execute(step)[1] for step in steps]
        for substitutions in gang.pool.ask([("substitutions", ())] * 2):
            (entry,) = (one for one in substitutions if one.what == "decoder_layer")
            assert entry.count == (3 if shares else 0)
            assert shares or "through TorchStage" in entry.reason_not
    torch.testing.assert_close(found[True], found[False], rtol=0.05, atol=0.05)
