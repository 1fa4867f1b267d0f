"""The CUDA backend's norms and rotations give what the models' own give, and stand only where they do."""

import functools
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config

from actors.tensors.backends.cuda.module_kernels import substitute_norms, substitute_rotary
from actors.tensors.backends.trial import Account, exchanging_nothing
from actors.tensors.model.parallel_layers import ColwiseRMSNorm
from actors.words.messages import Substitution
from cluster.collectives.interface import LoneShard, PresentGroup

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


def norms_of(model) -> Substitution:
    account = Account()
    substitute_norms(model, account)
    (found,) = account.entries()
    assert found.what == "rms_norm"
    return found


def rotary_of(model, compile_function=None) -> list[Substitution]:
    account = Account()
    substitute_rotary(model, account, compile_function)
    return account.entries()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "number"), [(LlamaConfig, 5), (Qwen3Config, 9), (GemmaConfig, 0)])
def test_norms_are_substituted_where_they_agree(config, number, dtype):
    model = model_of(config, dtype)
    ids = torch.arange(20).view(1, 20)
    expected = model(ids).logits.float()
    norms = norms_of(model)
    assert norms.count == number  # Gemma's adds one to the weight: it stays
    assert ("differs from the model's own" in str(norms.reason_not)) == (config is GemmaConfig)
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
    found = norms_of(model)
    assert found.count == 0
    assert "differs from the model's own" in str(found.reason_not) and "places" not in str(found.reason_not)


@pytest.mark.parametrize("size", [1, 2])
def test_a_norm_over_the_heads_of_all_shards_stays_where_there_are_others(size):
    class Shard(LoneShard):
        def all_reduce(self, tensor):
            raise AssertionError("shards try by themselves")

    group = Shard()
    group.size = size
    present, norm = PresentGroup(group), nn.RMSNorm(8, eps=1e-6)
    ColwiseRMSNorm.rebase(norm, present)
    account = Account()
    with exchanging_nothing(present):
        substitute_norms(nn.Sequential(norm), account)
    (found,) = account.entries()
    assert found.count == (size == 1)
    assert ("over the heads of all shards" in str(found.reason_not)) == (size == 2)


def test_the_rotary_function_of_the_model_s_file_is_compiled(monkeypatch):
    model = model_of(LlamaConfig, torch.float32)
    file = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(file, "apply_rotary_pos_emb", own := file.apply_rotary_pos_emb)
    ids = torch.arange(20).view(1, 20)
    expected = model(ids).logits
    compile_function = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    assert rotary_of(model, compile_function) == [Substitution("rotary", 1)]
    assert file.apply_rotary_pos_emb.own is own
    torch.testing.assert_close(model(ids).logits, expected)
    assert rotary_of(model) == [], "it is compiled already"


def test_a_rotary_function_that_comes_out_wrong_stays():
    model = model_of(LlamaConfig, torch.float32)
    file = sys.modules["transformers.models.llama.modeling_llama"]
    own = file.apply_rotary_pos_emb
    (wrong,) = rotary_of(model, lambda function: lambda q, k, cos, sin: function(q, k, sin, cos))
    assert wrong.count == 0 and "differs from the model's own" in str(wrong.reason_not)
    (failing,) = rotary_of(model, lambda function: lambda *_: 1 / 0)
    assert failing.count == 0 and "it fails: ZeroDivisionError" in str(failing.reason_not)
    assert file.apply_rotary_pos_emb is own
