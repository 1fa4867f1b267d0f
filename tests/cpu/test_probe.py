"""What the probe sees between modules: whether layers follow each other untouched, and who gets the same input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from actors.decisions.model.spec import Angles
from actors.tensors.model.probe import PROBE_NAME, Probe, Trace, on_fake_tensors, register_probe, same_inputs
from actors.tensors.model.skeleton import build_model, parameters_on_meta

GATED = ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj")
PROJECTIONS = tuple(f"model.layers.*.self_attn.{name}_proj" for name in "qkv")
CONFIG = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def trace_of(change: Callable[[PreTrainedModel], None]) -> Trace:
    """What a probe of a small Llama of four layers records, with something changed in it."""
    register_probe()
    with parameters_on_meta():
        model = build_model(LlamaConfig(**CONFIG, num_hidden_layers=4), torch.float32, PROBE_NAME, PROBE_NAME)
    with on_fake_tensors(model):
        change(model)
        return Probe(model, "model.layers", 64).run()


def before(name: str, change: Callable[[Any, Any], Any]) -> Callable[[PreTrainedModel], None]:
    """`change(args, kwargs)` before a module; what it returns is what the module gets."""

    def register(model: PreTrainedModel) -> None:
        module: nn.Module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, kwargs: change(args, kwargs), with_kwargs=True)

    return register


def test_a_llama_is_a_chain_whose_projections_share_their_inputs() -> None:
    trace = trace_of(lambda model: None)
    assert trace.are_chained
    assert trace.angles == Angles(8, "float32")
    assert same_inputs(trace) == {GATED, PROJECTIONS}


def add(args: Any, kwargs: Any) -> Any:
    return (args[0] + 1, *args[1:]), kwargs


def add_in_place(args: Any, kwargs: Any) -> Any:
    args[0].add_(1)
    return args, kwargs


def turn_otherwise(args: Any, kwargs: Any) -> Any:
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (cos.clone(), sin)}


def turn_in_another_dtype(args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "position_embeddings": tuple(one.double() for one in kwargs["position_embeddings"])}


@pytest.mark.parametrize("change", [add, add_in_place, turn_otherwise, turn_in_another_dtype])
def test_what_comes_between_two_layers_is_seen(change: Callable[[Any, Any], Any]) -> None:
    """Angles are known where those of all layers have one shape and one dtype."""
    trace = trace_of(before("model.layers.2", change))
    assert not trace.are_chained
    assert (trace.angles is None) == (change is turn_in_another_dtype)


@pytest.mark.parametrize("change", [add, add_in_place])
def test_a_linear_layer_with_an_input_of_its_own_is_in_no_group(change: Callable[[Any, Any], Any]) -> None:
    """In one layer of four is enough: patterns hold for all layers or for none."""
    assert same_inputs(trace_of(before("model.layers.1.mlp.up_proj", change))) == {PROJECTIONS}
    assert same_inputs(trace_of(before("model.layers.3.self_attn.v_proj", change))) == {GATED}


def hand_to_layer_2(made_of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[PreTrainedModel], None]:
    """Give a layer what is made of the tokens' embedding, beside its hidden states."""

    def register(model: PreTrainedModel) -> None:
        seen: list[torch.Tensor] = []
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
        before("model.layers.2", lambda args, kwargs: (args, {**kwargs, "position_ids": made_of(seen[0])}))(model)

    return register


@pytest.mark.parametrize(
    ("made_of", "is_needed"),
    [
        (lambda embedded: embedded, True),
        (lambda embedded: (embedded * 2)[..., 0], True),
        (lambda embedded: torch.zeros(8).add_(embedded[0, :, 0]), True),
        (torch.zeros_like, False),
        (lambda embedded: embedded.new_ones(8) * 2, False),
        (lambda embedded: torch.arange(embedded.shape[1]), False),
    ],
)
def test_a_layer_that_needs_what_only_the_first_stage_has_is_seen(
    made_of: Callable[[torch.Tensor], torch.Tensor], is_needed: bool
) -> None:
    assert trace_of(hand_to_layer_2(made_of)).exchanges_more == is_needed
