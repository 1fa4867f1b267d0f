"""Broken configs, one of each kind: `stagemesh plan` names the field and the remedy, and nothing is started."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from deployments import cli

pytestmark = [pytest.mark.timeout(10), pytest.mark.usefixtures("specs_are_read_once")]

ROOT = Path(__file__).resolve().parents[2]
PRESET = (ROOT / "configs" / "llama70b_tp8_pp4.yaml").read_text()

SCHEDULER = "      scheduler:"
STAGES = "pipeline_parallel_size: 4"

# (what stands in a preset, what is put in its place) → what is said
BREAKS = {
    "no such file": (None, "cannot be read .*name a Serve config file"),
    "no yaml": (("proxy_location: EveryNode", "proxy_location: [EveryNode"), "line "),
    "a key twice": (("      parallel:", "      model: {}\n      parallel:"), "'model' stands twice .*keep one"),
    "no applications": (("applications:", "programs:"), "applications: missing or empty"),
    "an unknown key": (("dtype: bfloat16", "dtyp: bfloat16"), "model.dtyp: .*dtype"),
    "an unknown group": (("      device: cuda", "      devices: cuda"), "devices: .*device"),
    "no source": (("source: meta-llama/Llama-3.3-70B-Instruct", "revision: main"), "model.source"),
    "an empty source": (("source: meta-llama/Llama-3.3-70B-Instruct", "source: ''"), "model.source"),
    "a source that is a file": (("meta-llama/Llama-3.3-70B-Instruct", "README.md"), "README.md holds no config.json"),
    "a source that nobody has": (("meta-llama/Llama-3.3-70B-Instruct", "some-org/none"), "some-org/none is neither"),
    "an unknown dtype": (("dtype: bfloat16", "dtype: int4"), "model.dtype: .*bfloat16"),
    "an unknown device": (("device: cuda", "device: tpu"), "device: .*cuda"),
    "a word for a number": (("max_model_len: 131072", "max_model_len: long"), "model.max_model_len: "),
    "a length beyond the model": (("max_model_len: 131072", "max_model_len: 131073"), "use at most 131072"),
    "no shards": (("tensor_parallel_size: 8", "tensor_parallel_size: 0"), "parallel.tensor_parallel_size: "),
    "a fraction of a shard": (("tensor_parallel_size: 8", "tensor_parallel_size: 1.5"), "tensor_parallel_size: "),
    "more shards than heads": (("tensor_parallel_size: 8", "tensor_parallel_size: 128"), "would work: 1, 2, 4, 8, 16"),
    "heads not divisible": (("tensor_parallel_size: 8", "tensor_parallel_size: 5"), "64 attention heads .*by 5"),
    "more stages than layers": (("pipeline_parallel_size: 4", "pipeline_parallel_size: 81"), "at most 80 would work"),
    "a cut that is short": (("[20, 20, 20, 20]", "[20, 20, 20]"), "parallel.layers_per_stage: .*80 layers to 4 stages"),
    "a stage without layers": (("[20, 20, 20, 20]", "[40, 40, 0, 0]"), "parallel.layers_per_stage"),
    "an unknown style": (
        (STAGES, STAGES + "\n        tp_plan: {layers.*.mlp.up_proj: columns}"),
        "'columns' is no style; styles are colwise",
    ),
    "a rule for nothing": (
        (STAGES, STAGES + "\n        tp_plan: {layers.*.mlp.w1: colwise}"),
        r"'layers.\*.mlp.w1' matches no module",
    ),
    "a rule that does not fit": (
        (STAGES, STAGES + "\n        tp_plan: {layers.*.self_attn.q_proj: replicate}"),
        "q_proj and .*o_proj do not fit",
    ),
    "a memory share above one": ((SCHEDULER, "      cache: {memory_share: 1.5}\n" + SCHEDULER), "cache.memory_share"),
    "a cache too small": ((SCHEDULER, "      cache: {num_blocks: 100}\n" + SCHEDULER), "num_blocks: 100 .*takes 8192"),
    "a step too small": (("max_num_batched_tokens: 8192", "max_num_batched_tokens: 100"), "scheduler.max_num_batched"),
    "an unknown strategy": (("STRICT_SPREAD", "SPREAD_OUT"), "placement.strategy"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_config_is_refused_with_the_field_and_the_remedy(name: str, tmp_path: Path) -> None:
    change, words = BREAKS[name]
    path = tmp_path / "serve.yaml"
    if change is not None:
        old, new = change
        assert PRESET.count(old) == 1, old
        path.write_text(PRESET.replace(old, new))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(["plan", str(path)]) == 1
    assert re.search(words, said.getvalue(), re.DOTALL), said.getvalue()
    assert "Traceback" not in said.getvalue()
    assert len(BREAKS) >= 25


def test_the_preset_itself_is_not_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serve.yaml").write_text(PRESET)
    assert cli.main(["plan", str(tmp_path / "serve.yaml")]) == 0
    capsys.readouterr()
