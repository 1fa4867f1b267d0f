"""Gangs without HTTP: the offline benchmark on the demo, the verification, and the example that loads a model."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

ray = pytest.importorskip("ray")

from ray.util.placement_group import placement_group_table  # noqa: E402

from deployments import cli  # noqa: E402
from tests.serving import reserved  # noqa: E402

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", DEMO, "--offline", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.soak
def test_two_layouts_of_the_demo(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(placement_group_table())
    arguments = ["--layouts", "1x1", "2x1", "--batch", "1", "3", "--input-len", "20", "--output-len", "12"]
    code, out, err = run_bench(capsys, *arguments, "--rounds", "2", "--json")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    whole, halves = report["layouts"]
    assert [len(one["weight_bytes"]) for one in (whole, halves)] == [1, 2]
    # What is cut is cut in two; norms are on both shards
    assert whole["weight_bytes"][0] / 2 < halves["weight_bytes"][0] < whole["weight_bytes"][0] * 0.51
    assert sum(halves["cache_bytes"]) == whole["cache_bytes"][0], "256 blocks each, KV heads dealt out"
    for one in (whole, halves):
        assert one["num_blocks"] == 256
        assert 0 < one["load_s"] < one["start_s"]
        assert all(nbytes > weights for nbytes, weights in zip(one["process_bytes"], one["weight_bytes"], strict=True))
        assert [speed["batch"] for speed in one["speeds"]] == [1, 3]
        assert all(speed["decode_tokens_per_s"] > 0 < speed["prefill_tokens_per_s"] for speed in one["speeds"])
    states = [group["state"] for name, group in placement_group_table().items() if name not in before]
    assert states == ["REMOVED"] * 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--layouts", "1x1", "3x1"], "4 KV heads|heads are not divisible by 3"),
        (["--layouts", "8x1"], "parallel.tensor_parallel_size|fit the cluster"),
        (["--batch", "65"], "--batch: 65, but scheduler.max_num_seqs is 64"),
        (["--input-len", "500", "--output-len", "13"], "513 tokens together, but model.max_model_len is 512"),
        (["--gpu", "h200"], "--gpu: the gang runs on cpu"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(
    arguments: list[str], named: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(placement_group_table())
    code, out, err = run_bench(capsys, *arguments)
    assert (code, out) == (1, "")
    assert re.search(named, err), err
    assert "starting" not in err and len(placement_group_table()) == before


def test_a_batch_that_the_cache_does_not_hold(
    cluster: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = tmp_path / "small.yaml"
    text = (
        Path(DEMO)
        .read_text()
        .replace("num_blocks: 256", "num_blocks: 32")
        .replace("tensor_parallel_size: 2", "tensor_parallel_size: 1")
    )
    small.write_text(text.replace("pipeline_parallel_size: 2", "pipeline_parallel_size: 1"))
    code = cli.main(["bench", str(small), "--offline", "--batch", "9", "--input-len", "60", "--output-len", "4"])
    err = capsys.readouterr().err
    assert code == 1
    assert "--batch: 9 sequences of 64 tokens take 36 KV blocks, but the cache has 32" in err
    assert not reserved()


def test_the_demo_is_verified(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["verify", DEMO, "--pp", "1", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.out + captured.err
    report: dict[str, Any] = json.loads(captured.out)
    assert report["verdict"] == "right" and report["first_difference"] is None
    assert report["tensor_parallel_size"] == 2 and report["prompts"] == 6
    found = report["as_served"]
    assert found["ids"]["equal"] == found["ids"]["total"] == 6 * 16
    assert found["layers_compared"] == report["num_layers"]
    assert 0 < found["logits_distance"] < found["logits_allowed"]
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}


@pytest.mark.soak
def test_a_wrong_kernel_is_found_and_left_out(
    cluster: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two gangs in turn: as it would be served, and without substitutions."""
    config = tmp_path / "faulty.yaml"
    device = "device: tests.faulty_backend.backend:FaultyBackend"
    config.write_text(Path(DEMO).read_text().replace("device: cpu", device))
    code = cli.main(["verify", str(config), "--tp", "1"])
    out = capsys.readouterr().out
    assert code == 1
    assert "Verdict: wrong by a substitution" in out
    assert "First difference: layer 2, model.layers.2.post_attention_layernorm.weight (rank 0)" in out
    assert "set `substitutions: none`" in out and "forgetful_norm" in out


def test_the_example_loads_a_model_from_python(cluster: None, tmp_path: Path) -> None:
    document = yaml.safe_load(Path(DEMO).read_text())
    del document["applications"][0]["args"]["parallel"]  # one rank: the demo's four would take longer to start
    config = tmp_path / "one_rank.yaml"
    config.write_text(yaml.safe_dump(document))
    entries = yaml.safe_load((ROOT / "tests/demo/questions.yaml").read_text(encoding="utf-8"))
    example = runpy.run_path(str(ROOT / "examples/load.py"))
    assert example["main"](str(config), entries[0]["question"]) == entries[0]["answer"]
    assert not reserved()
