"""Reading config.json: Transformers' own code instead of the checkpoint's, and every reason against serving it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import __version__ as version

from actors.tensors.model.config_reader import read_config_json
from actors.tensors.model.quantization import find_quantization, method_in_name
from actors.tensors.model.spec_reader import read_spec
from actors.words.errors import UnsupportedModel

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 103,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}
CODE = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a config.json: a small Llama's, with keys changed, or taken out where they are None."""

    def write(**keys: Any) -> Path:
        config = {key: value for key, value in {**LLAMA, **keys}.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def reasons(folder: Path) -> list[str]:
    with pytest.raises(UnsupportedModel) as refused:
        read_spec(folder)
    lines = str(refused.value).splitlines()
    assert all(len(line) <= 200 for line in lines), "a reason is longer than two lines"
    return lines


def test_code_of_the_checkpoint_is_not_needed_where_transformers_has_the_class(folder_of: Callable[..., Path]) -> None:
    spec = read_spec(folder_of(auto_map=CODE))
    assert spec.architecture == "LlamaForCausalLM"
    assert "Transformers' own LlamaForCausalLM is used" in spec.notes[0]
    assert not read_spec(folder_of()).notes


def test_a_class_that_is_spelled_otherwise_is_the_model_type_s_own(folder_of: Callable[..., Path]) -> None:
    assert read_spec(folder_of(auto_map=CODE, model_type="internlm3", architectures=["InternLM3ForCausalLM"]))
    assert read_spec(folder_of(auto_map=CODE, architectures=["LLaMAForCausalLM"]))


def test_only_what_needs_code_is_refused_for_it(folder_of: Callable[..., Path]) -> None:
    [line] = reasons(folder_of(auto_map=CODE, architectures=["OwnForCausalLM"]))
    assert f"Transformers {version} has no class OwnForCausalLM for model type llama" in line
    [line] = reasons(folder_of(auto_map=CODE, model_type="own"))
    assert f"Transformers {version} has no model type own (config.json: model_type), and code from" in line
    [line] = reasons(folder_of(model_type="own"))
    assert "auto_map" not in line
    [line] = reasons(folder_of(model_type="clip"))
    assert "has no class that generates text for model type clip" in line


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "FP8 (config.json: quantization_config)"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4 ("),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ, 4 bits ("),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "GPTQ, 8 bits ("),
    "nvfp4": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "NVFP4 ("),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes, 4 bits (",
    ),
    "compressed tensors": (
        {
            "compression_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            }
        },
        "compressed-tensors, 4 bits (config.json: compression_config)",
    ),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits (config.json: quantization)"),
    "of the text": (
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        "FP8 (config.json: text_config.quantization_config)",
    ),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_named_as_what_they_are(kind: str, folder_of: Callable[..., Path]) -> None:
    keys, words = QUANTIZED[kind]
    assert words in reasons(folder_of(**keys))[0]


@pytest.mark.parametrize(
    ("file", "said", "method"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, "NVFP4"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "GPTQ"),
        ("quant_config.json", {"w_bit": 4, "version": "GEMM"}, "AWQ"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"model.layers.0.mlp.up_proj.weight_scale_inv": "a.safetensors"}},
            "FP8",
        ),
    ],
)
def test_files_beside_config_json_tell_of_quantization(
    file: str, said: dict[str, Any], method: str, folder_of: Callable[..., Path]
) -> None:
    folder = folder_of()
    (folder / file).write_text(json.dumps(said))
    [line] = reasons(folder)
    assert f"quantized: {method} ({file}" in line


def test_what_is_not_quantized_is_not_called_so(folder_of: Callable[..., Path]) -> None:
    folder = folder_of(quantization_config=None, compression_config={})
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}})
    )
    assert find_quantization(folder, LLAMA) is None
    assert method_in_name("nvidia/Llama-3.1-70B-Instruct-FP8") == "FP8"
    assert method_in_name("/models/Qwen3-32B-w4a16/") == "W4A16"
    assert method_in_name("/fp8/Llama-3.1-70B") is None
    assert method_in_name("org/Bnbfp8ish-7B") is None


def test_no_reason_hides_another(folder_of: Callable[..., Path]) -> None:
    quantization = {"quant_method": "fp8"}
    quantized, unknown = reasons(folder_of(quantization_config=quantization, model_type="own", auto_map=CODE))
    assert "FP8" in quantized
    assert "no model type own" in unknown
    quantized, untested = reasons(
        folder_of(quantization_config=quantization, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    )
    assert "GPT2LMHeadModel has not been shown" in untested
    quantized, dtype, states = reasons(
        folder_of(
            quantization_config=quantization,
            torch_dtype="float64",
            model_type="lfm2",
            architectures=["Lfm2ForCausalLM"],
            layer_types=["conv", "full_attention"],
        )
    )
    assert dtype.startswith("model.dtype: config.json says float64; set model.dtype")
    assert "keeps the states of recurrent or convolution layers (its cache is asked for get_conv_state)" in states


def test_the_dtype_is_found_where_it_is_named(folder_of: Callable[..., Path]) -> None:
    assert read_spec(folder_of(torch_dtype="torch.float16")).dtype == "float16"
    assert read_spec(folder_of(torch_dtype=None, dtype="float32")).dtype == "float32"
    nested = read_config_json(folder_of(torch_dtype=None, text_config={"dtype": "float16"}))
    assert nested.dtype == "float16"
    spec = read_spec(folder_of(torch_dtype=None))
    assert (spec.dtype, spec.notes) == ("bfloat16", ("config.json names no dtype; bfloat16 is assumed",))
    folder = folder_of(torch_dtype=None)
    save_file(
        {"a": torch.ones(1, dtype=torch.int64), "b": torch.ones(1, dtype=torch.float16)}, folder / "model.safetensors"
    )
    spec = read_spec(folder)
    assert (spec.dtype, spec.notes) == (
        "float16",
        ("config.json names no dtype; float16 is that of the stored tensors",),
    )
    with pytest.raises(ValueError, match=r"model\.dtype: config\.json says int4"):
        read_spec(folder_of(torch_dtype="int4"))
    assert read_spec(folder_of(torch_dtype="int4"), "bfloat16").dtype == "bfloat16"


def test_a_value_that_transformers_does_not_take_is_a_reason(folder_of: Callable[..., Path]) -> None:
    [line] = reasons(folder_of(hidden_size="wide"))
    assert "cannot read config.json as model type llama" in line
    [line] = reasons(folder_of(num_attention_heads=5))
    assert "hidden size (32) is not a multiple of the number of attention heads (5)" in line


@pytest.mark.parametrize("said", [3, "FP8", [], {"quantization": "FP8"}, {"quantization": {"config_groups": {"a": 1}}}])
@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "model.safetensors.index.json"])
def test_files_that_say_nothing_to_us_do_not_end_in_a_traceback(
    file: str, said: Any, folder_of: Callable[..., Path]
) -> None:
    folder = folder_of(quantization_config={"quant_method": "x", "config_groups": said})
    assert find_quantization(folder, json.loads((folder / "config.json").read_text())) is not None
    (folder / file).write_text(json.dumps(said))
    find_quantization(folder, LLAMA)


def test_a_forward_that_fails_is_told_in_words_alone(
    folder_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("torch").addHandler(caplog.handler)  # its loggers do not tell the root
    try:
        [line] = reasons(folder_of(head_dim=3))
    finally:
        logging.getLogger("torch").removeHandler(caplog.handler)
    assert "cannot be followed on shapes alone" in line
    assert not caplog.records


def test_a_wrapper_that_is_named_after_its_text_is_read_as_what_it_is(folder_of: Callable[..., Path]) -> None:
    text = {**LLAMA, "model_type": "ministral3", "num_key_value_heads": 2, "head_dim": 8}
    reading = read_config_json(
        folder_of(architectures=["Mistral3ForConditionalGeneration"], model_type="ministral3", text_config=text)
    )
    assert reading.config is not None
    assert reading.config.model_type == "mistral3"
    assert reading.config.get_text_config(decoder=True).hidden_size == 32
    assert reading.notes == ("config.json is read as model type mistral3, not ministral3",)


def test_the_parts_that_text_does_not_need_are_named(folder_of: Callable[..., Path]) -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    wrapper = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    text = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "head_dim": 8}
    spec = read_spec(folder_of(**wrapper, text_config=text, vision_config={**small, "model_type": "pixtral"}))
    parts = "model.multi_modal_projector, model.vision_tower"
    assert spec.notes == (f"text alone is served, so these parts are left out: {parts}",)
    assert {name.split(".")[1] for name in spec.unused} == {"multi_modal_projector", "vision_tower"}
