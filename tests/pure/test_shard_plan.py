"""The shard plan: every element of every parameter is owned, cuts are as even as can be, wrong sizes are refused."""

import itertools
from dataclasses import replace

import pytest

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.shard_plan import cut_by_cost, make_shard_plans, split_evenly
from actors.decisions.model.sizes import Sizes, broken_constraints, valid_tensor_parallel_sizes
from actors.decisions.model.spec import AttentionSpec, LayerSpec, ModelSpec, Parameter
from actors.words.errors import UnsupportedModel
from cluster.topology import Topology
from configs.config import Config

STYLES = {
    "model.embed_tokens": "embedding_rowwise",
    "lm_head": "colwise_gather_output",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def make_spec(
    num_layers: int = 7, heads: int = 8, kv_heads: int = 4, ffn: int = 24, vocab: int = 103, tied: bool = False
) -> ModelSpec:
    hidden, dim = 16, 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {
            f"{attention}.q_proj.weight": (heads * dim, hidden),
            f"{attention}.q_proj.bias": (heads * dim,),
            f"{attention}.k_proj.weight": (kv_heads * dim, hidden),
            f"{attention}.v_proj.weight": (kv_heads * dim, hidden),
            f"{attention}.o_proj.weight": (hidden, heads * dim),
            f"{attention}.o_proj.bias": (hidden,),
            f"{attention}.q_norm.weight": (dim,),
            f"{mlp}.up_proj.weight": (ffn, hidden),
            f"{mlp}.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)

    def parameter(name: str, shape: tuple[int, ...]) -> Parameter:
        outside = "first" if "embed" in name else "last"
        return Parameter(name, shape, "bfloat16", "layer" if "layers" in name else outside)

    return ModelSpec(
        architecture="TestForCausalLM",
        model_type="test",
        config_digest="",
        state_shape=(hidden,),
        hidden_size=hidden,
        vocab_size=vocab,
        max_position=128,
        dtype="bfloat16",
        layers=tuple(
            LayerSpec((AttentionSpec(f"model.layers.{layer}.self_attn", heads, kv_heads, dim, dim),))
            for layer in range(num_layers)
        ),
        parameters=tuple(parameter(name, shape) for name, shape in shapes.items()),
        styles=STYLES,
        tied_head=tied,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2), (8, 3), (1, 7)])
def test_every_element_is_owned_as_often_as_the_rules_say(tp: int, pp: int, kv_heads: int, tied: bool) -> None:
    spec = make_spec(kv_heads=kv_heads, tied=tied)
    plans = make_shard_plans(spec, Topology(tp, pp))
    for parameter in spec.parameters:
        held = [tensor for plan in plans for tensor in plan.tensors if tensor.key == parameter.name]
        assert all(tensor.full_shape == parameter.shape for tensor in held)
        owners = dict.fromkeys(itertools.product(*map(range, parameter.shape)), 0)
        for tensor in held:
            for element in itertools.product(*(range(*interval) for [interval] in tensor.intervals)):
                owners[element] += 1
        module = parameter.name.split(".")[-2]
        if module in ("k_proj", "v_proj"):
            expected = max(1, tp // kv_heads)
        elif module in ("norm", "q_norm") or parameter.name.endswith("o_proj.bias"):
            expected = tp
        else:
            expected = 2 if tied and module == "embed_tokens" and pp > 1 else 1
        assert set(owners.values()) == {expected}, parameter.name


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_each_query_head_lies_beside_its_kv_head(tp: int, kv_heads: int) -> None:
    spec = make_spec(kv_heads=kv_heads)
    group = spec.attentions[0].num_heads // kv_heads
    for plan in make_shard_plans(spec, Topology(tp, 1)):
        for attention in plan.attentions:
            needed = {head // group for head in range(*attention.heads)}
            assert needed == set(range(*attention.kv_heads))


def test_weight_bytes_count_what_the_rank_holds() -> None:
    spec = make_spec(num_layers=2, tied=True)
    alone = make_shard_plans(spec, Topology(1, 1))[0]
    assert alone.weight_bytes == 2 * sum(parameter.numel for parameter in spec.parameters)
    first, last = make_shard_plans(spec, Topology(1, 2))
    # A tied weight at both ends of a pipeline is held twice
    assert first.weight_bytes + last.weight_bytes == alone.weight_bytes + 2 * spec.vocab_size * spec.hidden_size
    assert [tensor.key for tensor in last.tensors if tensor.name == "lm_head.weight"] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("total", [0, 1, 7, 103])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_split_evenly_covers_and_differs_by_one(total: int, num_shards: int) -> None:
    parts = [split_evenly(total, shard, num_shards) for shard in range(num_shards)]
    assert [i for part in parts for i in range(*part)] == list(range(total))
    sizes = [end - first for first, end in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_layers", [3, 7, 8])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("vocab", [16, 500, 5_000])
@pytest.mark.parametrize("tied", [False, True])
def test_no_cut_has_a_faster_slowest_stage(num_layers: int, stages: int, vocab: int, tied: bool) -> None:
    spec = make_spec(num_layers=num_layers, vocab=vocab, tied=tied)
    layer = sum(parameter.numel for parameter in spec.parameters if spec.layer_of(parameter.name) == 0)
    tail = vocab * spec.hidden_size + spec.hidden_size

    def slowest(bounds: tuple[int, ...]) -> int:
        costs = [(end - first) * layer for first, end in itertools.pairwise(bounds)]
        costs[-1] += tail
        return max(costs)

    cuts = cut_by_cost(spec, Topology(1, stages))
    bounds = (0, *(end for _, end in cuts))
    assert bounds[-1] == num_layers
    assert all(first < end for first, end in cuts)
    every = ((0, *inner, num_layers) for inner in itertools.combinations(range(1, num_layers), stages - 1))
    assert slowest(bounds) == min(map(slowest, every))


def test_layers_beside_an_overlong_tail_are_spread_evenly() -> None:
    cuts = cut_by_cost(make_spec(num_layers=7, vocab=100_000), Topology(1, 3))
    assert [end - first for first, end in cuts] == [3, 3, 1]


def test_a_given_cut_is_taken_or_refused() -> None:
    spec = make_spec()
    plans = make_shard_plans(spec, Topology(1, 3), (1, 4, 2))
    assert [plan.layers for plan in plans] == [(0, 1), (1, 5), (5, 7)]
    for wrong in ((3, 4), (3, 3, 3), (7, 0, 0), (8, 1, -2)):
        with pytest.raises(ValueError, match=r"parallel\.layers_per_stage"):
            make_shard_plans(spec, Topology(1, 3), wrong)


@pytest.mark.parametrize(
    ("spec", "topology", "words"),
    [
        (make_spec(heads=8), Topology(3, 1), ["8 attention heads", "1, 2, 4, 8"]),
        (make_spec(heads=6, kv_heads=6), Topology(2, 8), ["7 layers", "at most 7"]),
        (make_spec(heads=12, kv_heads=3), Topology(2, 1), ["3 KV heads", "1, 3, 6, 12"]),
        (make_spec(ffn=20), Topology(8, 1), ["20 ffn columns", "1, 2, 4"]),
        (make_spec(heads=8), Topology(16, 1), ["8 attention heads"]),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_would_work(
    spec: ModelSpec, topology: Topology, words: list[str]
) -> None:
    with pytest.raises(ValueError, match="parallel") as caught:
        make_shard_plans(spec, topology)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_valid_sizes_are_those_that_are_not_refused() -> None:
    spec = make_spec(heads=12, kv_heads=6, ffn=24)
    accepted = []
    for tp in range(1, 20):
        try:
            make_shard_plans(spec, Topology(tp, 1))
        except ValueError:
            continue
        accepted.append(tp)
    assert accepted == valid_tensor_parallel_sizes(Sizes.of(spec))


def test_an_attention_s_tensor_that_no_rule_deals_is_refused_by_name() -> None:
    spec = make_spec()
    other = Parameter("model.layers.0.self_attn.mixer.weight", (9, 16), "bfloat16", "layer")
    spec = replace(
        spec, parameters=(*spec.parameters, other), styles={**STYLES, "model.layers.*.self_attn.mixer": "colwise"}
    )
    with pytest.raises(UnsupportedModel, match="mixer"):
        make_shard_plans(spec, Topology(2, 1))


def with_experts(columns: int) -> ModelSpec:
    """A layer with three experts of so many columns, which torch multiplies in groups; bfloat16."""
    spec = make_spec(num_layers=1)
    experts = "model.layers.0.mlp.experts"
    parameters = (
        Parameter(f"{experts}.gate_up_proj", (3, 2 * columns, 16), "bfloat16", "layer"),
        Parameter(f"{experts}.down_proj", (3, 16, columns), "bfloat16", "layer"),
    )
    styles = {
        "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.experts.down_proj": "rowwise",
        "model.layers.*.mlp.experts": "moe_tp_experts",
    }
    return replace(
        spec,
        parameters=spec.parameters + parameters,
        styles={**spec.styles, **styles},
        grouped_experts=frozenset({"model.layers.*.mlp.experts"}),
    )


def test_columns_that_torch_s_grouped_product_does_not_take_are_refused() -> None:
    """Rows of matrices must begin at multiples of 16 bytes: 8 columns of bfloat16, 4 of float32."""
    sizes = Sizes.of(with_experts(48))
    assert valid_tensor_parallel_sizes(sizes) == [1, 2]
    [reason] = broken_constraints(sizes, Topology(4, 1))
    assert "48 columns of each expert are 12 on each of 4 shards" in reason
    assert "sizes that would work: 1, 2" in reason
    assert valid_tensor_parallel_sizes(Sizes.of(replace(with_experts(48), dtype="float32"))) == [1, 2, 4]
    ungrouped = replace(with_experts(48), grouped_experts=frozenset())
    assert valid_tensor_parallel_sizes(Sizes.of(ungrouped)) == [1, 2, 4, 8]


def plan_for(length: int | None = None, **cache: int) -> Plan:
    groups = {"model": {"source": "x", "max_model_len": length}, "cache": {"block_size": 8, **cache}}
    return make_plan(Config.model_validate(groups), make_spec())


def test_a_length_that_nobody_asked_for_is_what_the_cache_holds() -> None:
    plan = plan_for()
    assert plan.fitted(16).max_model_len == plan.fitted(1000).max_model_len == plan.max_model_len == 128
    assert plan.fitted(3).max_model_len == 24
    assert plan.fitted(3).num_blocks_for_longest == 3
    assert plan.fitted(3).fitted(3) == plan.fitted(3), "each epoch comes to the same"
    assert plan.fitted(3).shards == plan.shards
    with pytest.raises(ValueError, match=r"cache\.num_blocks: 0 blocks"):
        plan.fitted(0)
    assert plan_for(num_blocks=2).max_model_len == 128, "a small cache is no mistake where nobody asked for a length"


def test_a_length_that_was_asked_for_is_never_lowered() -> None:
    plan = plan_for(64)
    assert plan.fitted(8) == plan
    with pytest.raises(ValueError, match=r"7 blocks of 8 tokens do not hold one sequence of model.max_model_len 64"):
        plan.fitted(7)
    with pytest.raises(ValueError, match=r"cache\.num_blocks: 7 blocks"):
        plan_for(64, num_blocks=7)


def with_alternating_experts(spec: ModelSpec) -> ModelSpec:
    """Experts stored [in, out], whose gate and up columns alternate, with biases."""
    prefix, styles = "model.layers.0.mlp.experts", dict(spec.styles)
    shapes = {"gate_up": (4, 16, 24), "gate_up_bias": (4, 24), "down": (4, 12, 16), "down_bias": (4, 16)}
    for name, style in zip(
        shapes, ("interleaved_rowwise", "interleaved_rowwise", "colwise", "added_once"), strict=True
    ):
        styles[f"model.layers.*.mlp.experts.{name}"] = style
    experts = tuple(Parameter(f"{prefix}.{name}", shape, "bfloat16", "layer") for name, shape in shapes.items())
    return replace(spec, parameters=(*spec.parameters, *experts), styles=styles)


def test_columns_that_alternate_stay_in_pairs() -> None:
    spec = with_alternating_experts(make_spec(heads=4))
    assert valid_tensor_parallel_sizes(Sizes.of(spec)) == [1, 2, 4], "12 pairs and 4 heads"
    for shard, plan in enumerate(make_shard_plans(spec, Topology(4, 1))):
        held = {tensor.name.rpartition(".")[2]: tensor.intervals for tensor in plan.tensors if "experts" in tensor.name}
        assert held["gate_up"] == (((0, 4),), ((0, 16),), ((6 * shard, 6 * shard + 6),))
        assert held["gate_up_bias"] == (((0, 4),), ((6 * shard, 6 * shard + 6),))
        assert held["down"] == (((0, 4),), ((3 * shard, 3 * shard + 3),), ((0, 16),))


def test_pairs_are_what_shards_divide() -> None:
    spec = with_alternating_experts(make_spec(heads=8))
    with pytest.raises(ValueError, match="12 ffn columns are not divisible by 8"):
        make_shard_plans(spec, Topology(8, 1))


def test_a_bias_of_what_is_summed_is_on_the_first_shard_alone() -> None:
    plans = make_shard_plans(with_alternating_experts(make_spec()), Topology(2, 2))
    held = {plan.rank: [t for t in plan.tensors if t.name.endswith("down_bias")] for plan in plans}
    assert {rank: [tensor.is_zero for tensor in of_rank] for rank, of_rank in held.items()} == {
        0: [False],
        1: [True],
        2: [],
        3: [],
    }
    assert {tensor.shape for of_rank in held.values() for tensor in of_rank} == {(4, 16)}
    assert not any(tensor.is_zero for plan in plans for tensor in plan.tensors if "down_bias" not in tensor.name)
