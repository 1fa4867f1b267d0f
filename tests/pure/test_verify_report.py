"""What `stagemesh verify` says: who is at fault, what differs first, what to do; and which prompts it takes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import AttentionSpec, LayerSpec, MaskSpec, ModelSpec
from actors.tensors.verify.findings import Difference, Findings, Ids
from configs.config import Config
from deployments import cli
from deployments.verify import command
from deployments.verify.prompts import default_prompts, read_prompts
from deployments.verify.report import VerifyReport
from deployments.verify.text import as_text

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"
RIGHT = Findings(Ids(96, 95, 1), 0.008, 0.04, 0.009, 142, 6, (), frozenset())
WEIGHT = Difference(3, "model.layers.3.mlp.down_proj.weight", 1, 0.35, 0.01, 12, 40, is_inside=True)
HANDED_ON = Difference(3, "what model.layers.3 hands on", None, 0.2, 0.01, 90, 140, is_inside=False)
LATER = Difference(5, "model.layers.5.self_attn.q_proj.weight", 0, float("inf"), 0.01, 40, 40, is_inside=True)


def wrong(*differences: Difference) -> Findings:
    return dataclasses.replace(RIGHT, differences=differences, furthest=frozenset({(1, 7), (0, 3)}))


def report(as_served: Findings, closer: Findings | None = None, **changes: Any) -> VerifyReport:
    facts: dict[str, Any] = {
        "model": "stagemesh-demo",
        "architecture": "LlamaForCausalLM",
        "device": "cpu",
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "num_layers": 6,
        "prompts": 6,
        "shortest_prompt": 1,
        "longest_prompt": 64,
        "new_tokens": 16,
        "substitutions": ("rms_norm", "rotary"),
        "not_exercised": (),
    }
    return VerifyReport(**{**facts, **changes}, as_served=as_served, without_substitutions=closer)


def test_the_verdict_says_who_is_at_fault() -> None:
    assert report(RIGHT).verdict == "right"
    assert report(wrong(HANDED_ON), wrong(WEIGHT)).verdict == "wrong"
    by_kernel = report(wrong(HANDED_ON), RIGHT)
    assert by_kernel.verdict == "wrong by a substitution"
    assert "substitutions: none" in as_text(by_kernel) and "rms_norm, rotary" in as_text(by_kernel)
    assert by_kernel.first_difference == HANDED_ON
    assert report(wrong(HANDED_ON), RIGHT, substitutions=()).verdict == "wrong"  # then it differs from run to run


@pytest.mark.parametrize(
    "ids", [Ids(96, 95, 0, 1), Ids(96, 96, 0, 0, 1)], ids=["not Transformers' id", "not its own likeliest"]
)
def test_ids_alone_can_be_wrong(ids: Ids) -> None:
    found = dataclasses.replace(RIGHT, ids=ids)
    assert report(found, found).verdict == "wrong"
    assert "No module differs" in as_text(report(found, found))


def test_logits_alone_can_be_wrong() -> None:
    assert not dataclasses.replace(RIGHT, logits_distance=0.05).is_right
    assert not dataclasses.replace(RIGHT, logits_distance=float("nan")).is_right


def test_the_text_names_the_first_difference_within_100_columns() -> None:
    text = as_text(report(wrong(HANDED_ON), wrong(WEIGHT, LATER), not_exercised=("the window of 4096 tokens: " * 6,)))
    assert "First difference: layer 3, model.layers.3.mlp.down_proj.weight (rank 1)\n" in text
    assert "  - layer 5, model.layers.5.self_attn.q_proj.weight (rank 0)\n" in text
    assert "verify again with --tp 1 --pp 1" in text
    assert "95 of 96 as Transformers chooses them, 1 near ties" in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_says_the_same() -> None:
    said = json.loads(command._as_json(report(wrong(LATER), wrong(LATER))))
    assert said["verdict"] == "wrong"
    assert said["first_difference"]["what"] == LATER.what and said["first_difference"]["distance"] is None
    assert said["as_served"]["furthest"] == [[0, 3], [1, 7]]
    assert json.loads(command._as_json(report(RIGHT)))["first_difference"] is None


def plan_with(mask_spec: MaskSpec, max_model_len: int, vocab_size: int = 50) -> Plan:
    attention = AttentionSpec("model.layers.0.self_attn", 2, 2, 8, 8, mask_spec)
    layers = (LayerSpec((attention,)),)
    spec = ModelSpec("A", "a", "", (16,), 16, vocab_size, 8192, "float32", layers, (), {}, tied_head=False)
    config = {"model": {"source": "a", "max_model_len": max_model_len}, "cache": {"block_size": 16}}
    return make_plan(Config.model_validate(config), spec)


@pytest.mark.parametrize("mask_spec", [MaskSpec(window=300), MaskSpec(chunk=300)])
def test_a_prompt_is_longer_than_windows_and_chunks_or_that_is_said(mask_spec: MaskSpec) -> None:
    prompts = default_prompts(plan_with(mask_spec, 400), 16)
    assert not prompts.not_exercised
    assert len(prompts.ids[0]) > 300 and len({len(ids) for ids in prompts.ids}) > 4
    assert prompts.ids[1][:32] == prompts.ids[0][:32] and prompts.ids[1] != prompts.ids[0][: len(prompts.ids[1])]
    assert prompts == default_prompts(plan_with(mask_spec, 400), 16)
    cut = default_prompts(plan_with(mask_spec, 200), 16)
    assert max(map(len, cut.ids)) == 200 - 16
    assert "of 300 tokens that some layers have: the longest prompt has 184" in cut.not_exercised[0]


def test_prompts_of_a_file_are_texts_or_ids(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('What is a stage?\n\n{"prompt": [5, 6, 7]}\n{"prompt": "A shard"}\n')
    demo = plan_with(MaskSpec(), 512, vocab_size=1024)
    found = read_prompts(file, DEMO, demo, 16)
    assert len(found.ids) == 3 and found.ids[1] == (5, 6, 7) and len(found.ids[0]) > 2
    for line, told in (
        ('{"prompt": 5}', "line 1: `prompt` must be a text or a list of token ids"),
        ("{no", "line 1 is no JSON"),
        ('{"prompt": [99999]}', "prompt 1: 99999 is no id of"),
        (json.dumps({"prompt": [1] * 500}), "prompt 1 has 500 tokens; with 16 more, 1 to 496 fit"),
        ("", "holds no prompt"),
    ):
        file.write_text(line)
        with pytest.raises(ValueError, match=told):
            read_prompts(file, DEMO, demo, 16)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "nothing", DEMO, demo, 16)


@pytest.mark.parametrize("arguments", [["nowhere"], [f"{DEMO}.yaml", "--tp", "3"]])
def test_what_cannot_be_planned_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *arguments]) == 2
    assert capsys.readouterr().err
