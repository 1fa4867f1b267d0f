"""The check of one GPU runs whole on a CPU with tiny shapes, so that it works on the day there is a GPU."""

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu_stages import decode, numerics, prefill, random_model, stages, table  # noqa: E402

from deployments import hosting  # noqa: E402

TINY = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", "cpu", "--tiny", "--patience", "8"]
LAYERS, HIDDEN, FFN, VOCAB = 2, 64, 96, 512


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [*TINY, "--out", str(out), "--scratch", str(out.parent), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent)


@pytest.mark.all_cores
@pytest.mark.timeout(400)
def test_every_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    run = start(out)
    begun = set()
    while run.poll() is None:
        if out.exists():
            begun |= set(json.loads(out.read_text())["stages"])  # at any time it is JSON
        time.sleep(0.05)
    assert run.stdout is not None
    said = run.stdout.read()
    found = json.loads(out.read_text())
    assert run.returncode == 0, said
    assert begun == set(gpu_check.NAMES) == set(found["stages"])
    assert {stage["state"] for stage in found["stages"].values()} == {"ok"}, said
    rows = {name: stage["rows"] for name, stage in found["stages"].items()}
    assert {row["outcome"] for row in rows["numerics"]} == {"passed"}
    for name in ("decode_8b", "decode_70b"):
        steps = [row for row in rows[name] if "ms" in row]
        assert [row["batch"] for row in steps] == [1, 3]
        assert all(row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["ms"]) for row in steps)
        (kernels,) = (row["kernels"] for row in rows[name] if "kernels" in row)
        assert any(one["kernel"] == "aten::mm" and one["calls"] >= 7 for one in kernels)
    assert {row["by"] for row in rows["transformers"]} == {"generate", "continuous batching"}
    assert {row["prompts"] for row in rows["http"]} == {"fresh", "cached"}
    (kill,) = rows["kill"]
    assert kill["same_words"] == kill["streams"] and kill["epoch"] > 0 and kill["longest_pause_s"] > 0
    assert any("loaded the weights" in row.get("phase", "") for row in rows["start"])
    measured = {goal["figure"] for goal in found["goals"] if goal["measured"] is not None}
    assert len(measured) == 7, "those of batch 1, and of the start"
    assert all(figure in said for figure in measured) and "not judged here" in said
    assert list(tmp_path.iterdir()) == [out], "no checkpoint is left behind"


def test_a_run_that_is_cut_off_says_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    run = start(out)
    while not out.exists():
        time.sleep(0.05)
    started = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "cut off" in said and "8B bf16, a step at batch 1" in said
    assert json.loads(out.read_text())["stages"]["numerics"]["state"] == "cut off"
    assert not psutil.wait_procs(started, timeout=20)[1] and list(tmp_path.iterdir()) == [out]


def stage_of(work: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patience: float = 1.0) -> dict[str, Any]:
    """What the check finds of a stage that does some work, in a process of its own."""
    module: Any = ModuleType("gpu_stages.given")
    module.run = work
    monkeypatch.setitem(sys.modules, "gpu_stages.given", module)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)  # its file descriptor is the stage's log
    stage = stages.Stage("given", 30.0, "", "given:run")
    monkeypatch.setattr(stages, "STAGES", [stage])
    options = ["--device", "cpu", "--out", str(tmp_path / "out.json"), "--patience", str(patience)]
    check = gpu_check.Check(gpu_check.parse(options), tmp_path)
    found = {"state": "running", "reason": "", "rows": []}
    check.run_one(stage, found, multiprocessing.get_context("fork"))
    assert check.results["machine"]["device"] == "cpu"
    return found


def test_a_stage_that_takes_too_long_is_ended_and_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(job: stages.Job) -> None:
        job.record(child=subprocess.Popen(["sleep", "600"]).pid)
        with job.records.open("a") as file:
            file.write('{"half a')
        time.sleep(600)

    found = stage_of(work, monkeypatch, tmp_path, patience=0.1)
    assert found["state"] == "out of time" and found["reason"] == "more than 3 s"
    (row,) = found["rows"]
    assert not psutil.pid_exists(row["child"]) or psutil.Process(row["child"]).status() == psutil.STATUS_ZOMBIE


def test_a_stage_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(job: stages.Job) -> None:
        raise ArithmeticError("one and one")

    found = stage_of(fail, monkeypatch, tmp_path)
    assert (found["state"], found["reason"]) == ("failed", "ArithmeticError: one and one")
    assert "in fail" in found["log"]


def test_a_stage_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def look(job: stages.Job) -> None:
        raise stages.CannotRun("no disk")

    found = stage_of(look, monkeypatch, tmp_path)
    assert (found["state"], found["reason"]) == ("cannot run", "no disk")


def test_a_stage_that_dies_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = stage_of(lambda job: os._exit(3), monkeypatch, tmp_path)
    assert (found["state"], found["reason"]) == ("failed", "its process ended with 3")


def test_all_limits_together_are_five_minutes() -> None:
    limits = sum(stage.limit_s for stage in stages.STAGES)
    assert limits + stages.IMPORTS_S + stages.ENDING_S <= stages.TOTAL_S == 300


def test_stages_are_chosen_with_what_they_need() -> None:
    assert [one.name for one in gpu_check.chosen(["kill", "attention"], [])] == ["attention", "start", "kill"]
    assert [one.name for one in gpu_check.chosen(None, ["numerics", "start", "http", "kill"])] == [
        "decode_8b", "decode_70b", "attention", "prefill", "transformers",
    ]  # fmt: skip
    assert not {"start", "http", "kill"} & {one.name for one in gpu_check.chosen(None, ["start"])}
    for stage in stages.STAGES:
        module, _, function = stage.where.partition(":")
        assert callable(getattr(importlib.import_module(f"gpu_stages.{module}"), function))


def test_goals_are_judged_by_what_was_measured() -> None:
    rows = {
        "decode_8b": [{"batch": 1, "ms": 6.5, "limit_ms": 5.0, "tokens_per_s": 154.0},
                      {"batch": 64, "ms": 10.0, "limit_ms": 6.6, "tokens_per_s": 6400.0}],
        "decode_70b": [{"num_all_reduces": 161}, {"batch": 1, "ms": 7.0, "limit_ms": 5.8}],
        "http": [{"streams": 1, "prompts": "fresh", "tpot_ms": 9.0, "tokens_per_s": 1.0},
                 {"streams": 1, "prompts": "cached", "tpot_ms": 6.6, "tokens_per_s": 1.0},
                 {"streams": 64, "prompts": "cached", "tpot_ms": 9.0, "tokens_per_s": 5760.0}],
        "transformers": [{"batch": 64, "by": "generate", "ms": 25.0}],
    }  # fmt: skip
    found = {one["figure"]: (one["measured"], one["verdict"]) for one in table.goals(rows, is_judged=True)}
    assert found["8B bf16, a step at batch 1"] == (6.5, "done")
    assert found["8B bf16, a step at batch 64"] == (10.0, "not yet")
    assert found["8B bf16, a step at batch 8"] == (None, "not measured")
    assert found["70B at TP 8, batch 1, 10 µs an all-reduce"] == (pytest.approx(1000 / 8.61), "stretch")
    assert found["through HTTP, TPOT at 1 stream beside the bare step"] == (pytest.approx(6.6 / 6.5), "stretch")
    assert found["through HTTP, tokens/s at 64 streams beside the bare steps"] == (0.9, "done")
    assert found["generate, batch 64, beside our step"] == (2.5, "done")
    assert {one["verdict"] for one in table.goals(rows, is_judged=False)} == {"not measured", "not judged here"}


@pytest.mark.parametrize("num_shards", [1, 4])
def test_what_a_step_reads_is_counted_by_shard(num_shards: int) -> None:
    plan = random_model.plan_of("tiny", "float32", num_shards, max_model_len=128, max_num_seqs=2)
    matrices = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN) + HIDDEN * VOCAB  # the embedding is only looked up in
    weights = 4 * (matrices // num_shards + (2 * LAYERS + 1) * HIDDEN)
    assert random_model.weight_bytes_read(plan, 0) == weights
    keys_and_values = 2 * LAYERS * HIDDEN // num_shards * 4
    assert decode.bytes_of_a_step(plan, 3, 40.5) == pytest.approx(weights + 3 * 40.5 * keys_and_values)


def test_operations_of_a_prompt_are_counted() -> None:
    plan = random_model.plan_of("tiny", "float32", max_model_len=128)
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    pairs = 20 * 20 / 2
    assert prefill.operations(plan, 20) == 2 * (20 * weights + HIDDEN * VOCAB) + LAYERS * 4 * HIDDEN * pairs


def test_tests_of_value_come_first() -> None:
    class Item:
        def __init__(self, name: str) -> None:
            self.name = name

    names = ["test_x", "test_the_kernels_agree_with_attention_written_out[dtype1-16-spec0]",
             "test_the_kernels_agree_with_attention_written_out[dtype0-16-spec3]",
             "test_bfloat16_graphs_with_kernels_are_close_to_float32[llama]"]  # fmt: skip
    assert sorted(names, key=lambda name: numerics.value_of(Item(name))) == [names[3], names[2], names[1], names[0]]
    source = "".join(path.read_text() for path in (ROOT / "tests" / "gpu").glob("*.py"))
    assert all(f"def {name}(" in source for name in numerics.BY_VALUE)


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hosting, "version", missing)
    assert hosting._version() == "unknown"
