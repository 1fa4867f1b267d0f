"""Fused norms and rotations give what the models' own give, and stand only where they do."""

import functools
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config

from actors.tensors.backends.cuda.module_kernels import fuse_norms, fuse_rotary

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 50,
    "head_dim": 16,
}


def model_of(config, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "number"), [(LlamaConfig, 5), (Qwen3Config, 9), (GemmaConfig, 0)])
def test_norms_are_fused_where_they_agree(config, number, dtype):
    model = model_of(config, dtype)
    ids = torch.arange(20).view(1, 20)
    expected = model(ids).logits.float()
    assert fuse_norms(model) == number  # Gemma's adds one to the weight: it stays
    found = model(ids).logits.float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_norm_that_only_looks_like_one_stays():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x / x.abs().mean(-1, keepdim=True)

    model = nn.Sequential(Sum(), nn.LayerNorm(8, bias=False), nn.Linear(8, 8, bias=False))
    assert fuse_norms(model) == 0


def test_the_rotary_function_of_the_model_s_file_is_compiled(monkeypatch):
    model = model_of(LlamaConfig, torch.float32)
    file = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(file, "apply_rotary_pos_emb", own := file.apply_rotary_pos_emb)
    ids = torch.arange(20).view(1, 20)
    expected = model(ids).logits
    assert fuse_rotary(model, functools.partial(torch.compile, backend="aot_eager", fullgraph=True)) == 1
    assert file.apply_rotary_pos_emb.own is own
    torch.testing.assert_close(model(ids).logits, expected)
    assert fuse_rotary(model) == 0, "it is compiled already"


def test_a_rotary_function_that_comes_out_wrong_stays():
    model = model_of(LlamaConfig, torch.float32)
    file = sys.modules["transformers.models.llama.modeling_llama"]
    own = file.apply_rotary_pos_emb
    assert fuse_rotary(model, lambda function: lambda q, k, cos, sin: function(q, k, sin, cos)) == 0
    assert fuse_rotary(model, lambda function: lambda *_: 1 / 0) == 0
    assert file.apply_rotary_pos_emb is own
