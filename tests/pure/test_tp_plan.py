"""Rules of parallel.tp_plan: what they change, and what is refused by name before anything is cut."""

from typing import Any

import pytest

from actors.decisions.model.spec import AttentionSpec, LayerSpec, ModelSpec, Parameter
from actors.decisions.model.tp_plan import with_tp_plan
from actors.words.errors import UnsupportedModel
from configs.config import ParallelConfig

OWN = {
    "model.embed_tokens": "embedding_rowwise",
    "lm_head": "colwise_gather_output",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def make_spec(**styles: str) -> ModelSpec:
    names = {pattern.replace("*", str(layer)) for pattern in OWN for layer in range(2)}
    parameters = [Parameter(f"{name}.weight", (16, 16), "float32", "layer") for name in sorted(names)]
    parameters += [
        Parameter(f"model.layers.{layer}.moe.experts.up", (4, 64, 4), "float32", "layer") for layer in (0, 1)
    ]
    return ModelSpec(
        architecture="TestForCausalLM",
        model_type="test",
        config_digest="",
        state_shape=(16,),
        hidden_size=16,
        vocab_size=16,
        max_position=128,
        dtype="float32",
        layers=tuple(LayerSpec((AttentionSpec(f"model.layers.{n}.self_attn", 4, 4, 4, 4),)) for n in range(2)),
        parameters=tuple(parameters),
        styles={**OWN, "model.layers.*.moe.experts.up": "replicate", **styles},
        tied_head=False,
    )


def settled(rules: Any, spec: ModelSpec | None = None, **keys: Any) -> dict[str, str]:
    config = ParallelConfig(tensor_parallel_size=2, tp_plan=rules, **keys)
    return with_tp_plan(spec or make_spec(), config).styles


def test_auto_is_the_model_s_own() -> None:
    assert settled("auto") == make_spec().styles


@pytest.mark.parametrize("prefix", ["", "model."])
def test_rules_amend_the_model_s_own(prefix: str) -> None:
    changed = settled({f"{prefix}layers.*.mlp.up_proj": "replicate", f"{prefix}layers.*.mlp.down_proj": "replicate"})
    assert changed["model.layers.*.mlp.up_proj"] == "replicate"
    assert changed["model.layers.*.self_attn.q_proj"] == "colwise"


def test_rules_replace_the_model_s_own_when_told_to() -> None:
    rules = {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    assert settled(rules, tp_plan_mode="replace", allow_replication=True) == {
        "model.embed_tokens": "embedding_rowwise",
        "lm_head": "colwise_gather_output",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    with pytest.raises(ValueError, match=r"no rule cuts .*self_attn\.q_proj, .* set parallel\.allow_replication"):
        settled(rules, tp_plan_mode="replace")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"layers.*.mlp.up_proj": "colwize"}, "'colwize' is no style; styles are colwise, "),
        ({"layers.*.mlp.up_prj": "colwise"}, r"'layers.\*.mlp.up_prj' matches no module .* near are .*up_proj"),
        ({"layers.*.mlp.up": "colwise"}, "matches no module"),
        ({"layers.*.self_attn.q_proj": "replicate"}, "q_proj and .*o_proj do not fit"),
        ({"layers.*.self_attn.o_proj": "replicate", "layers.*.self_attn.q_proj": "colwise"}, "do not fit"),
        ({"lm_head": "replicate"}, "'lm_head' is always colwise_gather_output here, not replicate"),
        ({"layers.*.moe.experts.up": "packed_colwise"}, "nothing sums what .*experts returns"),
        ({"layers.*.moe.experts.up": "added_once"}, "nothing sums what .*experts returns"),
    ],
)
def test_wrong_rules_are_named(rules: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=r"parallel\.tp_plan: .*" + words):
        settled(rules)


def test_an_unknown_style_of_the_model_s_own_plan_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="uses local_colwise, which is not known"):
        settled("auto", make_spec(**{"model.layers.*.mlp.up_proj": "local_colwise"}))


def test_a_large_matrix_that_no_rule_cuts_is_refused_by_name() -> None:
    spec = make_spec()
    del spec.styles["model.layers.*.moe.experts.up"]
    with pytest.raises(ValueError, match=r"no rule cuts model\.layers\.\*\.moe\.experts\.up of TestForCausalLM"):
        settled("auto", spec)
    assert settled("auto", spec, allow_replication=True) == spec.styles
    assert with_tp_plan(spec, ParallelConfig()).styles == spec.styles, "one shard holds everything anyway"
