"""Configs of published checkpoints: each plans with the right numbers, or is refused for all that stands against it."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import __version__ as version

from deployments import cli

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("specs_are_read_once")]

PUBLISHED = Path(__file__).resolve().parents[1] / "data" / "published"


class Planned(NamedTuple):
    """What a plan says of a model: its parameters, and the bytes of a token in the KV cache."""

    parameters: int
    kv_bytes_per_token: int
    dtype: str = "bfloat16"


class Refused(NamedTuple):
    """Parts of the reasons, one a line, in order."""

    reasons: tuple[str, ...]


def quantized(method: str, mark: str = "config.json: quantization_config") -> str:
    return (
        f"weights are quantized: {method} ({mark}), and only unquantized ones are served; "
        "use a checkpoint of this model in bfloat16"
    )


def recurrent(name: str) -> str:
    return (
        f"{name} keeps the states of recurrent or convolution layers (its cache is asked for get_conv_state), which is "
        "not built; use a model that keeps only keys and values"
    )


def indexed(name: str, asked: str) -> str:
    return (
        f"{name} keeps the keys of a sparse indexer (its cache is asked for {asked}), which is not built; "
        "use a model that keeps only keys and values"
    )


def unknown(model_type: str) -> str:
    return (
        f"Transformers {version} has no model type {model_type} (config.json: model_type), and code from the "
        "checkpoint (auto_map) is never run; use a model of a type that it has"
    )


STREAMS = (
    "Gemma3nForCausalLM hands hidden states of shape [4, 1, tokens, 2048] from layer to layer; only "
    "[1, tokens, ...] is built, so use another model"
)
VERDICTS: dict[str, Planned | Refused] = {
    "AI21-Jamba-Mini-1.5": Refused((recurrent("JambaForCausalLM"),)),
    "Apertus-70B-Instruct-2509": Planned(70_599_864_640, 327_680),
    "Devstral-Small-2-24B": Refused((quantized("FP8", "config.json: quantization_config"),)),
    "ERNIE-4.5-21B-A3B-PT": Planned(21_825_437_888, 57_344),
    "EXAONE-4.0-32B": Planned(32_003_216_384, 262_144),
    "Falcon-H1-34B-Instruct": Refused((recurrent("FalconH1ForCausalLM"),)),
    "Hunyuan-A13B-Instruct": Planned(80_393_183_232, 131_072),
    "LFM2-2.6B": Refused((recurrent("Lfm2ForCausalLM"),)),
    "MiniMaxAI--MiniMax-M2.5": Refused((quantized("FP8", "config.json: quantization_config"),)),
    "Mistral-Small-3.1-24B-Instruct-2503": Planned(22_901_314_560, 163_840),
    "Olmo-3.1-32B": Planned(32_233_522_176, 262_144),
    "Phi-3.5-MoE-instruct": Planned(41_873_153_344, 131_072),
    "Qwen--Qwen3-235B-A22B": Planned(235_093_634_560, 192_512),
    "Qwen--Qwen3-235B-A22B-FP8": Refused((quantized("FP8", "config.json: quantization_config"),)),
    "Qwen--Qwen3-30B-A3B": Planned(30_532_122_624, 98_304),
    "Qwen--Qwen3-32B": Planned(32_762_123_264, 262_144),
    "Qwen--Qwen3-32B-FP8": Refused((quantized("FP8", "config.json: quantization_config"),)),
    "Qwen--Qwen3-8B": Planned(8_190_735_360, 147_456),
    "Qwen--Qwen3-VL-32B-Instruct": Planned(32_762_123_264, 262_144),
    "Qwen--Qwen3.5-27B": Refused((recurrent("Qwen3_5ForConditionalGeneration"),)),
    "Qwen--Qwen3.5-35B-A3B": Refused((recurrent("Qwen3_5MoeForConditionalGeneration"),)),
    "Qwen--Qwen3.5-397B-A17B": Refused((recurrent("Qwen3_5MoeForConditionalGeneration"),)),
    "Qwen3-Next-80B-A3B-Instruct": Refused((recurrent("Qwen3NextForCausalLM"),)),
    "deepseek-ai--DeepSeek-R1": Refused((quantized("FP8", "config.json: quantization_config"),)),
    "deepseek-ai--DeepSeek-V3": Refused((quantized("FP8", "config.json: quantization_config"),)),
    "deepseek-ai--DeepSeek-V3.2": Refused(
        (
            quantized("FP8", "config.json: quantization_config"),
            indexed("DeepseekV32ForCausalLM", "update_indexer"),
        )
    ),
    "deepseek-ai--DeepSeek-V4-Flash": Refused(
        (
            quantized("FP8", "config.json: quantization_config"),
            indexed("DeepseekV4ForCausalLM", "layers"),
        )
    ),
    "deepseek_v2_lite": Planned(15_748_993_024, 276_480),
    "gemma-3-27b-it": Planned(27_009_346_304, 507_904),
    "gemma-3n-E4B-it": Refused((STREAMS,)),
    "gemma2_27b": Planned(27_227_128_320, 376_832),
    "gemma3_1b_it": Planned(999_885_952, 26_624),
    "google--gemma-4-26B-A4B": Planned(25_233_141_790, 225_280),
    "granite-4.0-h-small": Refused((recurrent("GraniteMoeHybridForCausalLM"),)),
    "granite-4.0-micro": Planned(3_402_836_480, 81_920),
    "internlm3-8b-instruct": Planned(8_804_241_408, 49_152),
    "meta-llama--Llama-4-Maverick-17B-128E-Instruct": Planned(400_711_848_960, 196_608),
    "meta-llama--Llama-4-Scout-17B-16E-Instruct": Planned(107_769_861_120, 196_608),
    "meta-llama--Meta-Llama-3.1-405B": Planned(405_853_388_800, 516_096),
    "meta-llama--Meta-Llama-3.1-70B": Planned(70_553_706_496, 327_680),
    "meta-llama--Meta-Llama-3.1-8B": Planned(8_030_261_248, 131_072),
    "ministral3_3b_2512": Planned(3_429_006_336, 106_496),
    "mistralai--Mixtral-8x22B-v0.1": Planned(140_620_634_112, 229_376),
    "mistralai--Mixtral-8x7B-v0.1": Planned(46_702_792_704, 131_072),
    "moonshotai--Kimi-K2-Instruct": Refused(
        (
            quantized("FP8", "config.json: quantization_config"),
            unknown("kimi_k2"),
        )
    ),
    "moonshotai--Kimi-K2.5": Refused(
        (quantized("compressed-tensors, 4 bits", "config.json: text_config.quantization_config"),)
    ),
    "nvidia--DeepSeek-V3.1-NVFP4": Refused((quantized("NVFP4", "hf_quant_config.json"),)),
    "nvidia--Llama-3.1-70B-Instruct-FP8": Refused((quantized("FP8", "hf_quant_config.json"),)),
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1": Refused((unknown("nemotron-nas"),)),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Refused((recurrent("NemotronHForCausalLM"),)),
    "nvidia--Nemotron-H-56B-Base-8K": Refused((recurrent("NemotronHForCausalLM"),)),
    "nvidia--Qwen3-235B-A22B-NVFP4": Refused((quantized("NVFP4", "hf_quant_config.json"),)),
    "olmo2_32b": Planned(32_234_279_936, 524_288, "float32"),
    "openai--gpt-oss-120b": Refused((quantized("MXFP4", "config.json: quantization_config"),)),
    "openai--gpt-oss-20b": Refused((quantized("MXFP4", "config.json: quantization_config"),)),
    "phi-3_5": Planned(3_821_079_552, 393_216),
    "phi-4": Planned(3_836_021_760, 131_072),
    "phi-4-14b": Planned(14_659_507_200, 204_800),
    "starcoder2": Planned(7_173_923_840, 65_536),
    "zai-org--GLM-5": Refused((indexed("GlmMoeDsaForCausalLM", "update_indexer"),)),
}

# One of each kind of verdict, small models; the others are a soak
ALWAYS = (
    "Devstral-Small-2-24B",
    "LFM2-2.6B",
    "Mistral-Small-3.1-24B-Instruct-2503",
    "Phi-3.5-MoE-instruct",
    "deepseek-ai--DeepSeek-V3.2",
    "deepseek_v2_lite",
    "internlm3-8b-instruct",
    "moonshotai--Kimi-K2-Instruct",
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1",
    "zai-org--GLM-5",
)
EACH = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.soak) for name in sorted(VERDICTS)]


def verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> Planned | Refused:
    cli.main(["plan", str(folder), "--json"])
    said = json.loads(capsys.readouterr().out)
    if "parameters" in said:
        return Planned(said["parameters"], said["kv_bytes_per_token"], said["dtype"])
    return Refused(tuple(said["problems"]))


@pytest.mark.parametrize("name", EACH)
def test_a_published_config_plans_or_is_refused_for_all_that_stands_against_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verdict(PUBLISHED / name, capsys)
    assert found == VERDICTS[name]
    assert all(len(reason) <= 200 for reason in (found.reasons if isinstance(found, Refused) else ()))


def test_every_published_config_has_a_verdict() -> None:
    assert {folder.name for folder in PUBLISHED.iterdir() if folder.is_dir()} == set(VERDICTS)
