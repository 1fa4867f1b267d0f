"""Fusing: what is recognised is computed the same, and what only looks alike is left or taken apart again."""

import pytest
import torch
from torch import nn
from transformers import Ernie4_5Config, HeliumConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.activations import ACT2FN
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5Attention
from transformers.models.helium.modeling_helium import HeliumAttention
from transformers.models.llama import modeling_llama as known
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from actors.tensors.backends.cpu.llama.attention import KernelAttention
from actors.tensors.backends.cpu.module_kernels import KernelGatedMLP, KernelRMSNorm, MergedPart, fuse
from actors.tensors.model.linear import DenseLinear, OneDnnPackedLinear
from actors.tensors.model.parallel_layers import ColwiseLinear, RowwiseLinear, rebase
from cluster.collectives.interface import LoneShard

TYPES = [torch.float32, torch.bfloat16]


def colwise(module: nn.Module) -> nn.Module:
    """Every linear layer of a module is cut by rows, over one shard."""
    for child in list(module.modules()):
        if isinstance(child, nn.Linear):
            rebase(child, ColwiseLinear).place(LoneShard(), DenseLinear())
    return module.requires_grad_(False)


def llama(**fields: object) -> LlamaConfig:
    # As wide inside as outside: a layer of another input, the last one, looks like a sibling until it is used
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, "num_hidden_layers": 1, "_attn_implementation": "eager", **fields})


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_computes_the_same(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = colwise(known.LlamaDecoderLayer(llama(attention_bias=has_bias, mlp_bias=has_bias), 0).to(dtype))
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    x, angles = torch.randn(1, 5, 32).to(dtype), torch.rand(1, 5, 8)
    embeddings = angles.cos().to(dtype), angles.sin().to(dtype)
    mask = torch.full((5, 5), float("-inf"), dtype=dtype).triu(1)
    expected = layer(x, position_embeddings=embeddings, attention_mask=mask)
    fuse(layer)
    assert isinstance(layer.input_layernorm, KernelRMSNorm)
    assert isinstance(layer.mlp, KernelGatedMLP)
    assert len({id(getattr(layer.self_attn, name).method.siblings) for name in ("q_proj", "k_proj", "v_proj")}) == 1
    for _ in range(2):
        out = layer(x, position_embeddings=embeddings, attention_mask=mask)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_transformers_own_modules_stay_as_they_are() -> None:
    before = known.LlamaAttention.forward.__globals__["apply_rotary_pos_emb"]
    fuse(colwise(known.LlamaDecoderLayer(llama(), 0)))
    assert known.LlamaAttention.forward.__globals__["apply_rotary_pos_emb"] is before
    assert type(known.LlamaMLP(llama())) is known.LlamaMLP


@pytest.mark.parametrize(("kind", "config"), [(known.LlamaAttention, llama()), (Qwen2Attention, Qwen2Config())])
def test_attention_is_recognised_where_its_projections_are_the_only_siblings(kind: type, config: object) -> None:
    attention = colwise(kind(config, 0))
    rebase(attention.o_proj, RowwiseLinear)
    fuse(attention)
    assert isinstance(attention, KernelAttention)
    assert attention.siblings.layers == [attention.q_proj, attention.k_proj, attention.v_proj]


def test_another_family_with_the_same_code_is_recognised_too() -> None:
    config = Qwen3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1)
    attention = colwise(Qwen3Attention(config, 0))
    fuse(attention)
    assert isinstance(attention.q_norm, KernelRMSNorm)
    assert attention.forward.__globals__["apply_rotary_pos_emb"].__name__ == "rotate_both"


@pytest.mark.parametrize(("kind", "config"), [(HeliumAttention, HeliumConfig()), (Ernie4_5Attention, Ernie4_5Config())])
def test_attention_that_turns_other_numbers_by_the_same_code_is_left_alone(kind: type, config: object) -> None:
    assert kind.forward.__code__.co_code == known.LlamaAttention.forward.__code__.co_code
    attention = colwise(kind(config, 0))
    rebase(attention.o_proj, RowwiseLinear)
    forward = attention.forward.__func__
    fuse(attention)
    assert not isinstance(attention, KernelAttention)
    assert attention.forward.__func__ is forward


class Apart(nn.Module):
    """Two layers as wide as each other that get different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x + 1)], dim=-1)


def test_layers_with_different_inputs_are_taken_apart_again() -> None:
    module = colwise(Apart())
    x = torch.randn(3, 8)
    expected = module(x)
    fuse(module)
    assert isinstance(module.first.method, MergedPart)
    for _ in range(2):
        torch.testing.assert_close(module(x), expected)
    assert isinstance(module.first.method, OneDnnPackedLinear)
    assert isinstance(module.second.method, OneDnnPackedLinear)


def test_a_step_that_broke_off_leaves_nothing_behind() -> None:
    attention = colwise(known.LlamaMLP(llama(hidden_act="gelu")))  # siblings, but no kernel for what is between
    x, y = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    expected = attention.down_proj(ACT2FN["gelu"](attention.gate_proj(y)) * attention.up_proj(y))
    fuse(attention)
    assert not isinstance(attention, KernelGatedMLP)
    attention(x)
    attention.gate_proj(x)  # and then an error, before the other was asked
    torch.testing.assert_close(attention(y), expected)
    assert isinstance(attention.gate_proj.method, MergedPart)
    assert not attention.gate_proj.method.siblings._parts
