"""What test_triton.py runs in a process whose kernels Triton interprets: kernels, whole models, and launches."""

import functools
import runpy
import threading
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4Config,
    GptOssConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from actors.decisions.model.launches import OF_A_STEP, launches_of_a_layer
from actors.decisions.model.memory import activation_bytes
from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import AttentionSpec
from actors.decisions.schedule.largest_step import largest_step
from actors.tensors.attention.metadata import LayerCache
from actors.tensors.backend import StepInputs
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda import graph_runner, layer_kernels, layers, rotary_kernels
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.cuda.layer_kernels import Norm
from actors.tensors.backends.cuda.rotary_kernels import HeadNorms
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from configs.config import Config
from tests.fakes.held_bytes import HeldBytes
from tests.families.launches import Launches

pytestmark = pytest.mark.timeout(900)  # an interpreter is slow, and slower beside others
CPU = torch.device("cpu")
NAN = float("nan")
KERNEL = type(layer_kernels._gate)
worlds = runpy.run_path(str(Path(__file__).with_name("test_graph_runner.py")))
threads = runpy.run_path(str(Path(__file__).parent.parent / "families" / "threads.py"))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [16, 40, 1100])
@pytest.mark.parametrize(("has_norm", "has_norm_of_y"), [(True, False), (True, True), (False, True)])
def test_a_residual_is_added_and_the_sum_is_normed(size: int, has_norm: bool, has_norm_of_y: bool) -> None:
    x, y, weights = normal(1, 3, size), normal(1, 3, size, seed=1), normal(2, size, seed=2)
    x[0, 1] *= 1e-3
    y[0, 1] *= 1e-3
    norm, norm_of_y = Norm(weights[0], 1e-5), Norm(weights[1], 1e-3)
    found = layer_kernels.add_rms_norm(x, y, norm if has_norm else None, norm_of_y if has_norm_of_y else None)
    total = x + (torch.nn.functional.rms_norm(y, (size,), weights[1], 1e-3) if has_norm_of_y else y)
    torch.testing.assert_close(found[0], total)
    if has_norm:
        torch.testing.assert_close(found[1], torch.nn.functional.rms_norm(total, (size,), weights[0], 1e-5))
        torch.testing.assert_close(
            layer_kernels.rms_norm(x, norm), torch.nn.functional.rms_norm(x, (size,), weights[0], 1e-5)
        )
    else:
        assert found[1] is found[0]


class OncePerRow(torch.nn.RMSNorm):
    """Multiplies by its weight in float32, and rounds behind it only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (self.weight.float() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class TwicePerRow(OncePerRow):
    """Rounds before its weight, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@pytest.mark.parametrize("kind", [OncePerRow, TwicePerRow])
def test_a_norm_rounds_where_the_model_s_own_does(kind: type[torch.nn.RMSNorm]) -> None:
    """In float16, since the interpreter has no bfloat16."""
    norm = kind(300, eps=1e-5).half()
    with torch.inference_mode():
        norm.weight.copy_(1 + 0.3 * normal(300))
        x = normal(1, 7, 300, seed=1).half()
        own = norm(x)
        assert layers._substitute_norm(norm) is None
        assert norm.norm.rounds_first == (kind is TwicePerRow)
        assert (norm(x) != own).float().mean() < 0.01, "but for the order of a sum"
        norm.norm = norm.norm._replace(rounds_first=not norm.norm.rounds_first)
        assert (norm(x) != own).float().mean() > 0.05


def test_a_layer_takes_the_norm_of_what_it_gets_and_of_nothing_else() -> None:
    x, y, norm = normal(1, 3, 16), normal(1, 3, 16, seed=1), torch.nn.RMSNorm(16, eps=1e-5)
    assert layers._substitute_norm(norm) is None
    handover = layers._Handover(norm)
    with torch.no_grad():
        total = handover.add(x, y, None)
        with mock.patch.object(norm, "forward", side_effect=AssertionError("it is there already")):
            torch.testing.assert_close(handover.norm(total), torch.nn.functional.rms_norm(x + y, (16,), eps=1e-5))
        handover.add(x, y, None)
        between = total * 2 + 1  # something stands between the layers
        torch.testing.assert_close(handover.norm(between), norm(between))
        torch.testing.assert_close(handover.norm(total), norm(total))


@pytest.mark.parametrize("activation", layer_kernels.ACTIVATIONS)
def test_a_gate_is_an_activation_times_the_rest(activation: str) -> None:
    both = 6 * normal(1, 3, 2 * 1100)
    both[0, 0, 0], both[0, 0, 1] = 300.0, -300.0
    gate, up = both.chunk(2, dim=-1)
    own = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(layer_kernels.gate(both, activation), own * up)
    wide = normal(1, 3, 5000)[..., :2200]  # a view
    torch.testing.assert_close(
        layer_kernels.gate(wide, "silu"), torch.nn.functional.silu(wide[..., :1100]) * wide[..., 1100:]
    )


def rotate(x_Td: torch.Tensor, cos_Ta: torch.Tensor, sin_Ta: torch.Tensor, way: str) -> torch.Tensor:
    """The four ways of Transformers' models, in their own words, over the last dimension."""
    if way == "half the angles":
        first, second = x_Td.chunk(2, dim=-1)
        return torch.cat([first * cos_Ta - second * sin_Ta, second * cos_Ta + first * sin_Ta], dim=-1)
    size = cos_Ta.shape[-1]
    part, rest = x_Td[..., :size], x_Td[..., size:]
    if way == "halves":
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-part[..., 1::2], part[..., 0::2]], dim=-1).flatten(-2)
    if way == "neighbors, angles twice":
        cos_Ta, sin_Ta = (angles[..., : size // 2].repeat_interleave(2, dim=-1) for angles in (cos_Ta, sin_Ta))
    return torch.cat([part * cos_Ta + turned * sin_Ta, rest], dim=-1)


WAYS = ["halves", "neighbors, angles twice", "neighbors", "half the angles"]


@pytest.mark.parametrize(
    ("heads", "head_dim", "angle_dim", "block_size", "way", "norms"),
    [
        ((4, 2), 16, 16, 16, "halves", "none"),
        ((7, 1), 20, 20, 24, "halves", "single"),
        ((3, 3), 128, 128, 4, "halves", "all"),
        ((4, 2), 20, 12, 16, "halves", "single"),
        ((3, 1), 24, 12, 16, "neighbors, angles twice", "none"),
        ((4, 2), 16, 16, 16, "neighbors, angles twice", "all"),
        ((4, 4), 16, 16, 16, "neighbors", "none"),
        ((5, 1), 16, 8, 16, "half the angles", "single"),
    ],
)
def test_queries_are_rotated_and_keys_and_values_are_in_their_slots(
    heads: tuple[int, int], head_dim: int, angle_dim: int, block_size: int, way: str, norms: str
) -> None:
    (num_heads, num_kv_heads), num_tokens = heads, 5
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    product = normal(1, num_tokens, sum(sizes))
    cos, sin = normal(1, num_tokens, angle_dim, seed=1), normal(1, num_tokens, angle_dim, seed=2)
    lengths = {"none": None, "single": (head_dim, head_dim), "all": sizes[:2]}[norms]
    head_norms = lengths and HeadNorms(*(Norm(normal(length, seed=3), 1e-5) for length in lengths))
    slots_T = torch.tensor([3, 0, 2 * block_size, block_size + 1, 3 * block_size - 1])
    shape = 4, block_size, num_kv_heads, head_dim
    cache = LayerCache(AttentionSpec("", *heads, head_dim, head_dim), torch.full(shape, 7.0), torch.full(shape, 8.0))
    possible = rotary_kernels.rotations(angle_dim, head_dim)
    found = rotary_kernels.rotate_and_store(
        product, cos, sin, possible[WAYS.index(way)], head_norms, slots_T, cache, num_heads
    )

    query, key, value = product[0].split(sizes, dim=-1)
    if head_norms:
        size = len(head_norms.query.weight_N)
        query, key = (
            torch.nn.functional.rms_norm(x.reshape(num_tokens, -1, len(norm.weight_N)), norm.weight_N.shape, *norm[:2])
            for x, norm in zip((query, key), head_norms, strict=True)
        )
        assert size == head_dim or query.shape[1] == 1
    query, key, value = (part.reshape(num_tokens, -1, head_dim) for part in (query, key, value))
    rotated = [rotate(x, cos[0][:, None], sin[0][:, None], way) for x in (query, key)]
    torch.testing.assert_close(found, rotated[0].transpose(0, 1))
    keys, values = torch.full(shape, 7.0), torch.full(shape, 8.0)
    keys.view(-1, num_kv_heads, head_dim)[slots_T] = rotated[1]
    values.view(-1, num_kv_heads, head_dim)[slots_T] = value
    torch.testing.assert_close(cache.keys_NbHD, keys)
    assert torch.equal(cache.values_NbHD, values)


SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 53,
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,  # biases
    "qwen3": Qwen3Config,  # norms over heads
    "gemma2": Gemma2Config,  # norms behind each part, norms of one plus the weight, a tanh in its activation
    "phi3": Phi3Config,  # products that are one layer in the checkpoint; heads rotated in part
    "glm4": Glm4Config,  # the same, neighbors rotated, other norms behind each part
    "olmo2": Olmo2Config,  # norms behind each part only, and of all heads together
    "gpt_oss": GptOssConfig,  # sinks, biases, half the angles, experts
}
ABOUT = {  # beside SIZES
    "phi3": {"partial_rotary_factor": 0.5, "pad_token_id": 0},
    "glm4": {"attention_bias": True},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5},
}
NUM_NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "gemma2": 9, "phi3": 5, "glm4": 9, "olmo2": 9, "gpt_oss": 5}


def folder_of(family: str, parent: Path, **sizes: int) -> Path:
    given = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **SIZES,
        **ABOUT.get(family, {}),
        **sizes,
    }
    config = FAMILIES[family](**given)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            is_vector = parameter.dim() == 1
            around = 1.0 if is_vector and family != "gemma2" else 0.0
            parameter.copy_(normal(*parameter.shape, seed=number) * (0.3 if is_vector else 0.2) + around)
    model.save_pretrained(parent / family)
    return parent / family


def plan_of(folder: Path, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> Plan:
    config = Config(
        model={"source": str(folder), "max_model_len": 80},
        parallel={"tensor_parallel_size": tensor_parallel, "pipeline_parallel_size": pipeline_parallel},
        cache={"block_size": worlds["BLOCK_SIZE"]},
        scheduler={"max_num_seqs": 5},
    )
    return make_plan(config, read_spec(folder))


def ids_of(runner: Runner, plan: Plan, num_steps: int) -> list[list[list[int]]]:
    results = worlds["run"](worlds["World"](36, plan.spec.vocab_size, 1), runner.launch, num_steps)
    return [step.token_ids for step in results]


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runner]:
    """A runner on the CUDA backend, whose kernels are interpreted."""

    @functools.cache
    def make(family: str, num_layers: int = 2) -> Runner:
        folder = folder_of(family, tmp_path_factory.mktemp(family), num_hidden_layers=num_layers)
        with mock.patch.object(
            graph_runner, "_TOKENS_GATHERED", worlds["BLOCK_SIZE"]
        ):  # one block, were tables gathered
            runner = worlds["make"](CUDABackend(CPU), plan_of(folder), folder)
        runner.folder = folder
        return runner

    return make


USUAL = ("gemma2", "glm4", "gpt_oss")  # Qwen 3 is below, in shards


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in USUAL else [pytest.mark.soak]) for family in FAMILIES]
)
def test_fused_models_bring_the_ids_of_the_cpu(family: str, runner_of: Callable[..., Runner]) -> None:
    """Prompts in chunks, decode rows beside them, decode steps over static buffers; NaN in every slot not written."""
    runner = runner_of(family)
    plan = runner.plan
    expected = ids_of(worlds["make"](CPUBackend(CPU), plan, runner.folder), plan, 7)
    assert len({token_id for step in expected for ids in step for token_id in ids}) > 5
    found = {one.what: one.count for one in runner.substitutions}
    others = {
        "gated_mlp": 2,
        "attention_block": 2,
        "decoder_layer": 2,
        "paged_attention": 2,
        "vocabulary_search": 1,
    }
    if family == "gpt_oss":
        del others["gated_mlp"]  # it has experts
    assert found == {"rms_norm": NUM_NORMS[family], **others}, runner.substitutions
    assert runner.attention._builder.mask_specs == frozenset(), "no masks are made for attentions that need none"
    shapes = runner.graphs.buckets.shapes
    assert {shape.num_blocks for shape in shapes if shape.is_decode} == {plan.num_blocks_for_longest}, (
        "none is gathered"
    )
    assert max(shape.num_tokens for shape in shapes) == 512
    for tensor in runner.cache.tensors:
        tensor.fill_(NAN)
    runner.graphs._steps.clear()
    with mock.patch.object(runner.cache, "clear", side_effect=AssertionError("fresh blocks need no zeros")):
        assert ids_of(runner, plan, 7) == expected
    assert {shape.is_decode for shape in runner.graphs._steps} == {True, False}, "decode steps and mixed ones"


@pytest.mark.parametrize("layout", [(2, 1), pytest.param((2, 2), marks=pytest.mark.soak)])
def test_shards_and_stages_of_fused_models_bring_the_same_ids(
    layout: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards, whose sums go over their group inside the layers; two stages, whose layers hand nothing over."""
    run, one_at_a_time = KERNEL.run, threading.Lock()

    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_at_a_time:  # the interpreter has one grid for all threads
            return run(self, *args, **kwargs)

    monkeypatch.setattr(KERNEL, "run", alone)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layout[1]}
    folder = folder_of("qwen3", tmp_path, **sizes)
    opened = [NewSequence(seq, SamplingParams(0.8, seed=seq), [], 3) for seq in range(2)]
    answers = []
    for backend in (CPUBackend, CUDABackend):
        gang = threads["ThreadGang"](plan_of(folder, *layout), folder, worlds["NUM_BLOCKS"], backend(CPU))
        ids = [[seq, 2, 3] for seq in range(2)]
        for number in range(3):
            start = 2 + number if number else 0
            entries = [
                Entry(seq, start, ids[seq][start:], [] if number else [2 * seq, 2 * seq + 1], True) for seq in range(2)
            ]
            step = StepBatch(0, number, 0, [] if number else opened, [], entries)
            for seq, (token_id,) in enumerate(worlds["execute"](gang, step)):
                ids[seq].append(token_id)
        answers.append(ids)
    assert answers[0] == answers[1]


@pytest.fixture
def launches() -> Callable[[Callable[[], Any]], Counter[str]]:
    """launches(work): what a piece of work launches."""
    return Launches().of


TEN = ["gemma2"]


@pytest.mark.parametrize("is_decode", [True, False])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in TEN else [pytest.mark.soak])
        for family in FAMILIES
        if family != "gpt_oss"
    ],
)
def test_a_decoder_layer_takes_ten_launches(
    family: str,
    is_decode: bool,
    launches: Callable[[Callable[[], Any]], Counter[str]],
    runner_of: Callable[..., Runner],
) -> None:
    """In a step over static buffers, as a graph captures it: those of two layers less those of one. Eleven if mixed."""
    found = []
    for num_layers in (1, 2):
        graphs = runner_of(family, num_layers).graphs
        shape = next(shape for shape in graphs.buckets.shapes if shape.is_decode == is_decode)
        graphs.fill(shape, StepInputs(array("q"), [], [], torch.zeros(0, 0, dtype=torch.int64), []))
        found.append(launches(graphs.run))
    layer = found[1] - found[0]
    products = {name: number for name, number in layer.items() if name in ("mm", "addmm", "linear")}
    kernels = {"attend_splits": 1, "merge_splits": 1, "_rotate_and_store": 1, "_gate": 1, "_add_rms_norm": 2}
    kernels |= {} if is_decode else {"attend_chunks": 1}
    assert layer - Counter(products) == Counter(kernels) and sum(products.values()) == 4, layer
    assert not is_decode or sum(layer.values()) == launches_of_a_layer(runner_of(family).plan.spec)


def test_what_a_decode_step_takes_outside_its_layers_is_about_what_is_estimated(
    launches: Callable[[Callable[[], Any]], Counter[str]], runner_of: Callable[..., Runner]
) -> None:
    """Inputs, the last norm, the head, and sampling at a temperature."""
    runner = runner_of("qwen3", 1)
    opened = [NewSequence(0, SamplingParams(0.8, seed=1), [], 3)]
    runner.execute(StepBatch(0, 0, 0, opened, [], [Entry(0, 0, [1, 2, 3], [0], True)]))
    step = StepBatch(0, 1, 0, [], [], [Entry(0, 3, [4], [], True)])
    found = launches(lambda: runner.launch(step))
    runner.execute(StepBatch(0, 2, 0, [], [0], []))
    assert sum(found.values()) - launches_of_a_layer(runner.plan.spec) == pytest.approx(OF_A_STEP, rel=0.2), found


@pytest.mark.soak
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_a_fused_step_holds_is_what_is_planned(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The activations of fused layers; what the interpreter itself holds is left out."""
    run = KERNEL.run

    def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(KERNEL, "run", hidden)
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    folder = folder_of(family, tmp_path, **sizes, intermediate_size=448, num_hidden_layers=2)
    plan = plan_of(folder)
    runner = Runner(plan, 0, worlds["Alone"](), CUDABackend(CPU))
    runner.load(folder)
    runner.put_cache(1)
    step, closing = largest_step(plan.scheduler, plan.max_model_len, 96, lane=0)
    with HeldBytes() as held:
        runner.execute(step)
    runner.execute(closing)
    assert activation_bytes(plan, 0, 96) == pytest.approx(held.peak, rel=0.15)
