"""The verification: a right model is right in every dtype, and each planted fault is found and named by its layer."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.shard_plan import ShardPlan, TensorSlice
from actors.decisions.model.spec import MaskSpec
from actors.tensors.backends.cpu.llama.layers import LayerRun
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.sequence_table import StepTensors
from actors.tensors.verify.findings import Findings, Served
from actors.tensors.verify.recorder import Places, RecordingRunner
from actors.tensors.verify.verification import Verification
from configs.config import Config

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

from outcome import SETTINGS
from support import read
from threads import ThreadGang, serve
from tiny import make_config, make_model, save

LENGTHS = (30, 11, 5, 1)  # tokens of prompts
FEW = (30, 5)
SERVED = [name for name, outcome in read()[0].items() if outcome.kind == "right"]
NUM_NEW = 6


class RememberingRunner(RecordingRunner):
    """Remembers the last step's output too, from which the gang of threads takes its logits."""

    output: torch.Tensor

    def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
        self.output = super().forward(tensors, state)
        return self.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save(make_model(make_config(family, SETTINGS[family])), made[family])
        return made[family]

    return of


def plan_of(folder: Path, dtype: str, tp: int = 2, pp: int = 2, block_size: int = 4) -> Plan:
    config = {
        "model": {"source": str(folder), "max_model_len": 64},
        "parallel": {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "allow_replication": True},
        "cache": {"block_size": block_size},
    }
    return make_plan(Config.model_validate(config), read_spec(folder, dtype))


def verified(
    plan: Plan,
    folder: Path,
    plant: Callable[[Any], None] = lambda gang: None,
    wrong: Plan | None = None,
    lengths: tuple[int, ...] = FEW,
    substitutes: bool = True,
    places: Places = frozenset(),
) -> Findings:
    """Serve prompts by a gang of the plan, or of a wrong one, and compare with what the plan should give."""
    torch.set_num_threads(1)
    numbers = torch.Generator().manual_seed(1)
    prompts = [torch.randint(plan.spec.vocab_size, (n,), generator=numbers).tolist() for n in lengths]
    prompts.insert(1, prompts[0][:9] + prompts[0][3:6])  # the prefix cache spares it two blocks
    runner_class = partial(RememberingRunner, places=places)
    gang = ThreadGang(wrong or plan, folder, 80, runner_class=runner_class, substitutes=substitutes)
    plant(gang)
    answers = serve(gang, prompts, NUM_NEW)
    served = [Served(tuple(prompt), tuple(ids)) for prompt, (ids, _) in zip(prompts, answers, strict=True)]
    recordings = [runner.recorder.recording() for runner in gang.runners]
    verification = Verification(folder, plan, "cpu", 1, recordings, served)
    for sequence in range(len(served)):
        verification.compare(sequence)
    return verification.findings()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gemma2", "mixtral", "gpt_oss"])
def test_a_right_model_is_right(family: str, dtype: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    found = verified(plan_of(folder, dtype), folder, lengths=LENGTHS)
    assert found.is_right, found
    assert found.ids.total == NUM_NEW * (len(LENGTHS) + 1)
    assert found.ids.equal + found.ids.near_ties == found.ids.total
    assert found.layers_compared == 5
    assert (found.own_distance is None) == (dtype == "float32")


def with_shard(plan: Plan, rank: int, **changes: Any) -> Plan:
    shards = list(plan.shards)
    shards[rank] = dataclasses.replace(shards[rank], **changes)
    return dataclasses.replace(plan, shards=tuple(shards))


def swapped(plan: Plan, rank: int, name: str) -> Plan:
    """A rank reads another shard's part of a tensor."""
    other: ShardPlan = plan.shards[rank ^ 1]
    theirs: dict[str, TensorSlice] = {tensor.name: tensor for tensor in other.tensors}
    tensors = [theirs[name] if tensor.name == name else tensor for tensor in plan.shards[rank].tensors]
    return with_shard(plan, rank, tensors=tuple(tensors))


def with_window(plan: Plan, layer: int, window: int) -> Plan:
    """All shards of a stage let a layer's tokens see another number of tokens."""
    for rank, shard in enumerate(plan.shards):
        attentions = [
            dataclasses.replace(one, spec=dataclasses.replace(one.spec, mask_spec=MaskSpec(window=window)))
            if plan.spec.layer_of(one.spec.name) == layer
            else one
            for one in shard.attentions
        ]
        plan = with_shard(plan, rank, attentions=tuple(attentions))
    return plan


SWAPPED = [
    ("gemma2", 1, "model.layers.0.self_attn.k_proj.weight", 0),
    ("gemma2", 2, "model.layers.3.mlp.down_proj.weight", 3),
    ("mixtral", 3, "model.layers.4.mlp.experts.down_proj", 4),
]


@pytest.mark.parametrize(("family", "rank", "tensor", "layer"), SWAPPED)
def test_a_swapped_shard_is_named(
    family: str, rank: int, tensor: str, layer: int | None, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(family)
    plan = plan_of(folder, "bfloat16")
    found = verified(plan, folder, wrong=swapped(plan, rank, tensor), substitutes=False)
    assert not found.is_right
    first = found.differences[0]
    assert (first.layer, first.rank) == (layer, rank), found
    assert tensor in first.what


def test_a_shifted_head_is_named(checkpoint: Callable[[str], Path]) -> None:
    """Every second sampled id is another then, but for its logits each layer is right."""
    folder = checkpoint("mixtral")
    plan = plan_of(folder, "bfloat16")
    rows = tuple(
        dataclasses.replace(one, intervals=(((50, 102),), *one.intervals[1:])) if one.name == "lm_head.weight" else one
        for one in plan.shards[3].tensors
    )
    found = verified(plan, folder, wrong=with_shard(plan, 3, tensors=rows), substitutes=False)
    (only,) = found.differences
    assert (only.layer, only.rank) == (None, 3)
    assert "lm_head.weight" in only.what
    assert found.ids.wrong and not found.ids.not_sampled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_window_that_is_off_by_one_is_named(dtype: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("gemma2")
    plan = plan_of(folder, dtype)
    windows = [one.mask_spec.window for one in plan.spec.attentions]
    layer = windows.index(6, 1)
    found = verified(plan, folder, wrong=with_window(plan, layer, 5), substitutes=False)
    assert [one.layer for one in found.differences] == [layer], found
    assert "the attention itself · window 6" in found.differences[0].what


def test_kernels_may_hide_layers_but_not_their_faults(tmp_path: Path) -> None:
    """Where the device computes several layers in one call they are compared as one, and a second gang looks inside."""
    sizes = {"head_dim": 64, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}
    save(make_model(make_config("llama", sizes)), tmp_path)
    plan = plan_of(tmp_path, "bfloat16", tp=1, block_size=16)
    seen: list[Any] = []
    found = verified(plan, tmp_path, seen.append)
    assert found.is_right, found
    layers = [layer for runner in seen[0].runners for layer in runner.model.module.model.layers]
    runs = [layer for layer in layers if isinstance(layer, LayerRun)]
    assert [len(run.layers) for run in runs] in ([], [3, 2]), "a run a stage, where the processor has the instructions"
    assert found.layers_compared == (len(runs) or 5)

    wrong = with_window(plan, 1, 5)
    found = verified(plan, tmp_path, wrong=wrong)
    assert found.differences[0].is_inside != bool(runs)
    closer = verified(plan, tmp_path, wrong=wrong, substitutes=False, places=found.furthest)
    assert closer.differences[0].layer == 1 and "the attention itself" in closer.differences[0].what
    assert closer.differences[0].of > found.differences[0].of or not runs


def test_a_wrong_rope_factor_is_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mixtral")
    plan = plan_of(folder, "bfloat16")

    def plant(gang: ThreadGang) -> None:
        module: Any = gang.runners[2].model
        module.module.model.rotary_emb.inv_freq /= 2

    first = verified(plan, folder, plant, substitutes=False).differences[0]
    assert (first.layer, first.rank) == (plan.shards[2].layers[0], 2)
    assert "rotary embedding" in first.what


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SERVED)
def test_every_family_that_is_served_is_right(family: str, dtype: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    spec = read_spec(folder, dtype)
    plan = plan_of(folder, dtype, pp=1 if spec.exchanges_more else 2)
    found = verified(plan, folder, lengths=LENGTHS)
    assert found.is_right, found
    assert found.layers_compared == spec.num_layers
