"""Every causal family with a tensor-parallel plan is right or refused by name, and the support table says which."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent))

import support
from find_settings import families
from outcome import (
    PROMPT_LENGTHS,
    SETTINGS,
    config_of,
    make_config,
    make_model,
    outcome_of,
    outcome_of_published,
    reference,
    save,
    serve_in,
    write_config,
)
from safetensors.torch import load_file, save_file
from shrunk import NAMES, published

from actors.decisions.model.families import TESTED
from actors.decisions.model.plan import make_plan
from actors.decisions.model.sizes import Sizes, valid_tensor_parallel_sizes
from actors.tensors.model.config_reader import auto_class
from actors.tensors.model.skeleton import build_skeleton, read_model_config
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.weights.checkpoint import boxes, find_sources, load_weights
from actors.tensors.weights.conversion import Conversions
from actors.tensors.weights.mapped import as_slices
from actors.words.errors import CheckpointError, UnsupportedModel
from configs.config import Config

pytestmark = pytest.mark.timeout(120)

# One of each kind: dense, windows and caps, fused, norms over all heads, experts of three layouts, latent attention,
# experts with biases, sinks, chunks, scales, per-layer inputs, recurrent layers, and two that see as well.
REPRESENTATIVE = (
    "llama",
    "gemma2",
    "phi3",
    "olmo2",
    "mixtral",
    "aria_text",
    "deepseek_v3",
    "gpt_oss",
    "granite_swa",
    "llama4",
    "granite",
    "gemma4_text",
    "qwen3_moe",
    "glm4",
    "jamba",
    "mistral3",
)
ALL = [pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.soak) for name in sorted(SETTINGS)]
# Of published shapes: experts with biases and sinks, latent attention with groups of experts.
SHAPES = ("openai--gpt-oss-20b", "deepseek-ai--DeepSeek-V3")
PUBLISHED = [pytest.param(name, marks=() if name in SHAPES else pytest.mark.soak) for name in NAMES]
CANNOT_BE_MADE = {"bailing_hybrid", "qwen4_exp_text"}  # no tiny config of theirs builds in Transformers; refused below


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", ALL)
def test_a_family_is_what_the_support_table_says(family: str, tmp_path: Path) -> None:
    outcome = outcome_of(family, tmp_path)
    assert outcome.kind != "wrong", outcome.reason
    assert outcome == support.read()[0][family], "run tests/families/support.py"
    assert outcome.kind == "refused" or outcome.architecture in TESTED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_is_what_the_support_table_says(name: str, tmp_path: Path) -> None:
    outcome = outcome_of_published(name, tmp_path)
    assert outcome.kind != "wrong", outcome.reason
    assert outcome == support.read()[1][name], "run tests/families/support.py"
    assert outcome.kind == "refused" or outcome.architecture in TESTED


def test_the_tables_are_complete_and_enough_is_right() -> None:
    tried, published = support.read()
    assert set(families()) - CANNOT_BE_MADE <= set(tried)
    assert set(tried) == set(SETTINGS)
    assert set(published) == set(NAMES)
    assert support.tables(tried, published) == support.SUPPORT.read_text()
    right = [outcome.architecture for outcome in (*tried.values(), *published.values()) if outcome.kind == "right"]
    assert set(right) == TESTED
    assert len(right) >= 85 + 80
    assert not any(outcome.kind == "wrong" for outcome in (*tried.values(), *published.values()))
    assert set(REPRESENTATIVE) <= set(tried)
    assert set(SHAPES) <= set(published)


def test_families_without_a_tiny_config_are_not_served() -> None:
    assert not {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in CANNOT_BE_MADE} & TESTED


def test_what_nobody_has_shown_to_be_right_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import GPT2Config

    save(make_model(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=101)), tmp_path)
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        read_spec(tmp_path)


@pytest.mark.parametrize(("size", "num_layers", "num_experts"), [("20b", 24, 32), ("120b", 36, 128)])
def test_gpt_oss_is_planned_at_its_real_size(size: str, num_layers: int, num_experts: int, tmp_path: Path) -> None:
    """By hand, from what its makers say of it; at TP 2 a rank holds half of all but norms, routers and two biases."""
    write_config(published(f"openai--gpt-oss-{size}"), tmp_path)
    spec = read_spec(tmp_path, "bfloat16")
    hidden, heads, kv_heads, dim, vocabulary = 2880, 64, 8, 64, 201_088
    whole_biases = hidden + num_experts * hidden  # of the output projection, and of what the experts put out
    whole = whole_biases + 2 * hidden + num_experts * (hidden + 1)
    columns = (heads + 2 * kv_heads) * dim
    cut = columns * (hidden + 1) + heads * dim * hidden + heads
    cut += num_experts * (2 * hidden * (hidden + 1) + hidden * hidden)
    outside = 2 * vocabulary * hidden
    assert sum(parameter.numel for parameter in spec.parameters) == num_layers * (whole + cut) + outside + hidden
    plan = make_plan(config_of(tmp_path, 2, 1), spec)
    half = num_layers * (2 * whole + cut) // 2 + outside // 2 + hidden
    assert [shard.weight_bytes for shard in plan.shards] == [2 * half] * 2
    assert {attention.mask_spec.window for attention in spec.attentions} == {128, None}


# Rules of one's own: each leaves the numbers as they are, and puts the work elsewhere
RULES: dict[str, dict[str, str]] = {
    "ffn whole": dict.fromkeys(
        ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj", "layers.*.mlp.down_proj"), "replicate"
    ),
    "attention gathered": {
        "model.layers.*.self_attn.q_proj": "colwise_gather_output",
        "model.layers.*.self_attn.k_proj": "colwise_gather_output",
        "model.layers.*.self_attn.v_proj": "colwise_gather_output",
        "model.layers.*.self_attn.o_proj": "rowwise_split_input",
    },
    "norms for sequences": {"layers.*.input_layernorm": "sequence_parallel"},
}


@pytest.mark.parametrize("rules", RULES)
def test_rules_of_one_s_own_change_no_number(rules: str, tmp_path: Path) -> None:
    save(make_model(make_config("llama", SETTINGS["llama"])), tmp_path)
    spec, references = read_spec(tmp_path), [reference(tmp_path, length) for length in PROMPT_LENGTHS]
    for layout in ((2, 1), (2, 2)):
        assert not serve_in(layout, tmp_path, spec, references, tp_plan=RULES[rules])


@pytest.mark.parametrize(("original", "lengths"), [(64, (4, 23)), (16, (20, 23))])
def test_rotary_factors_are_chosen_once(original: int, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """Up to the original length, and for prompts beyond it, they are those that Transformers takes."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 300.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
        "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        "original_max_position_embeddings": original,
        "partial_rotary_factor": 1.0,
    }
    changes = {"rope_parameters": rope, "head_dim": None, "hidden_size": 48}
    save(make_model(make_config("phi3", {**SETTINGS["phi3"], **changes})), tmp_path)
    references = [reference(tmp_path, length) for length in lengths]
    assert not serve_in((2, 2), tmp_path, read_spec(tmp_path), references)


@pytest.mark.parametrize(("original", "lengths"), [(64, (4,)), (16, (20,))])
def test_angles_that_a_forward_scales_by_positions_are_chosen_once(
    original: int, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """As in Phi-3.5-MoE: the forward itself asks how long the longest sequence is."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 300.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "short_mscale": 1.1,
        "long_mscale": 1.4,
        "original_max_position_embeddings": original,
    }
    save(make_model(make_config("phimoe", {**SETTINGS["phimoe"], "rope_parameters": rope})), tmp_path)
    references = [reference(tmp_path, length) for length in lengths]
    assert not serve_in((2, 1), tmp_path, read_spec(tmp_path), references)


@pytest.mark.parametrize("family", ALL)
def test_dtypes_are_those_that_transformers_loads(family: str, tmp_path: Path) -> None:
    """Also of what stays in float32 when the rest is bfloat16."""
    save(make_model(make_config(family, SETTINGS[family])), tmp_path)
    try:
        spec = read_spec(tmp_path, "bfloat16")
    except UnsupportedModel:
        return
    auto = auto_class(AutoConfig.from_pretrained(tmp_path))
    loaded = auto.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    ours = {parameter.name: parameter.dtype for parameter in spec.parameters}
    assert ours == {name: str(loaded[name].dtype).removeprefix("torch.") for name in ours}


@pytest.mark.parametrize("family", [param for param in ALL if param.values[0] != "jamba"])
def test_shards_gathered_are_the_original(family: str, tmp_path: Path) -> None:
    """Every tensor, rank by rank, at TP 2, 4 and 8 where the sizes allow it, as Transformers itself loads it."""
    model: Any = make_model(make_config(family, {**SETTINGS[family], **wider(family)}))
    save(model, tmp_path)
    original = model.state_dict()
    try:
        spec = read_spec(tmp_path)
    except UnsupportedModel:
        assert support.read()[0][family].kind == "refused"
        return
    conversions = Conversions(build_skeleton(read_model_config(tmp_path), torch.float32))
    sizes = [tp for tp in (2, 4, 8) if tp in valid_tensor_parallel_sizes(Sizes.of(spec))]
    assert 2 in sizes
    for tp in sizes:
        config = {"tensor_parallel_size": tp}
        plan = make_plan(Config.model_validate({"model": {"source": "x"}, "parallel": config}), spec)
        gathered: dict[str, torch.Tensor] = {}
        for shard in plan.shards:
            tensors = {
                tensor.name: torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype)) for tensor in shard.tensors
            }
            report = load_weights(find_sources(tmp_path, spec, shard, conversions), tensors)
            assert report.bytes_copied == shard.weight_bytes
            for tensor in shard.tensors:
                if tensor.is_zero:
                    assert not tensors[tensor.name].any()
                    continue
                whole = gathered.setdefault(tensor.name, torch.full(tensor.full_shape, float("nan")))
                for box, place in boxes(tensor.intervals):
                    whole[as_slices(box)] = tensors[tensor.name][place].float()
        for name, whole in gathered.items():
            assert torch.equal(whole, original[name].float()), name
        assert set(gathered) | spec.unused >= set(original) - {f"{spec.head_name}.weight"}


def wider(family: str) -> dict[str, Any]:
    """Eight heads, so that there is something to deal to eight shards."""
    if (
        family in ("dots3_note_text", "gemma3", "helium", "jais2", "llama4", "longcat_flash")
        or "num_attention_heads" in SETTINGS[family]
    ):
        return {}
    return {"num_attention_heads": 8} if not {"num_key_value_heads"} & set(SETTINGS[family]) else {}


def test_checkpoints_have_the_names_that_users_have_on_disk(tmp_path: Path) -> None:
    save(make_model(make_config("mixtral", SETTINGS["mixtral"])), tmp_path)
    keys = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in keys


def test_experts_that_are_stored_twice_are_refused(tmp_path: Path) -> None:
    """Apart, as users have them, and once more fused: one of the two would be silently left out."""
    model = make_model(make_config("mixtral", SETTINGS["mixtral"]))
    save(model, tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {key: tensor for file in tmp_path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for file in (*tmp_path.glob("*.safetensors"), tmp_path / "model.safetensors.index.json"):
        file.unlink()
    save_file({**tensors, name: model.state_dict()[name] + 1}, tmp_path / "model.safetensors")
    spec = read_spec(tmp_path)
    plan = make_plan(Config.model_validate({"model": {"source": str(tmp_path)}}), spec)
    conversions = Conversions(build_skeleton(read_model_config(tmp_path), torch.float32))
    with pytest.raises(CheckpointError, match=r"are both stored for model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        find_sources(tmp_path, spec, plan.shards[0], conversions)


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    """Transformers' default for Mistral 3 ties the head, and the published checkpoints hold another one beside it."""
    model = make_model(make_config("mistral3", {**SETTINGS["mistral3"], "tie_word_embeddings": False}))
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    assert not spec.tied_head
    assert "they are not tied" in spec.notes[0]
    for layout in ((2, 1), (1, 2)):
        assert not serve_in(layout, tmp_path, spec, [reference(tmp_path, 11)])
