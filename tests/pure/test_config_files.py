"""Config files: what is shipped is valid, and every mistake is said by key, with a remedy, all of them at once."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from configs.config import Config
from configs.files import parse_args, read_config, read_document
from deployments.serve.schema import check_schema

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = {"model": {"source": "some/model"}}


def problems_of(args: dict[str, Any]) -> list[str]:
    with pytest.raises(ValueError) as caught:
        parse_args(args)
    return str(caught.value).splitlines()


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_valid_for_serve_and_for_us(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    check_schema(path)
    document = read_document(path)
    schema = ServeDeploySchema.model_validate(document)
    assert [app.import_path for app in schema.applications] == ["deployments.app:build_app"]
    assert schema.http_options.host == "127.0.0.1"
    assert document == yaml.safe_load(path.read_text())
    assert read_config(path) == Config.model_validate(document["applications"][0]["args"])


def test_the_shipped_files_are_what_their_names_say() -> None:
    for path in SHIPPED:
        named = re.fullmatch(r".*_tp(\d+)(?:_pp(\d+))?", path.stem)
        parallel = read_config(path).parallel
        if named:
            expected = int(named[1]), int(named[2] or 1)
            assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == expected, path.name
    assert {"demo", "llama70b_tp8", "llama405b_tp8_pp4", "custom_tp_plan"} <= {path.stem for path in SHIPPED}


def test_the_demo_fits_two_cpus() -> None:
    config = read_config(ROOT / "configs/demo.yaml")
    assert 4 * config.placement.cpus_per_rank + config.placement.cpus_per_replica <= 2
    assert config.served_name == "stagemesh-demo"
    block_size = config.cache.block_size or 16  # the CPU's default
    assert (config.cache.num_blocks or 0) * block_size >= (config.model.max_model_len or 0)


def test_defaults_and_the_served_name() -> None:
    config = parse_args({"model": {"source": "meta-llama/Llama-3.1-8B-Instruct/"}})
    assert config.served_name == "Llama-3.1-8B-Instruct"
    assert config.parallel.tensor_parallel_size == 1
    with pytest.raises(ValidationError):
        config.device = "cuda"


def test_all_problems_are_said_at_once_by_key() -> None:
    problems = problems_of(
        {
            "parallel": {"tensor_paralel_size": 2, "pipeline_parallel_size": "2"},
            "cache": {"num_blocks": 0},
            "device": "gpu",
        }
    )
    assert len(problems) == 5
    keys = {problem.split(": ")[0] for problem in problems}
    assert keys == {
        "args.model",
        "args.parallel.tensor_paralel_size",
        "args.parallel.pipeline_parallel_size",
        "args.cache.num_blocks",
        "args.device",
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"parallel": {"tensor_paralel_size": 2}}, "did you mean parallel.tensor_parallel_size?"),
        ({"tensor_parallel_size": 2}, "did you mean parallel.tensor_parallel_size?"),
        ({"paralel": {}}, "did you mean parallel?"),
        ({"cache": {"zebra": 1}}, "known here: block_size, num_blocks, memory_share"),
        ({"parallel": {"tensor_parallel_size": "2"}}, "it is '2' (a string); remove the quotes"),
        ({"parallel": {"tensor_parallel_size": 0}}, "greater than or equal to 1, but it is 0"),
        ({"parallel": {"tensor_parallel_size": True}}, "a valid integer, but it is True (a truth value)"),
        ({"parallel": {"layers_per_stage": [3, 0]}}, "args.parallel.layers_per_stage.1: "),
        ({"cache": {"memory_share": float("inf")}}, "a finite number"),
        ({"device": "gpu"}, "'cuda' or the class of a backend, package.module:Class, but it is 'gpu'"),
        ({"device": "package.module"}, "package.module:Class, but it is 'package.module'"),
        ({"device": "package.module:Class "}, "package.module:Class, but it is 'package.module:Class '"),
        ({"scheduler": None}, "should be a mapping, but it is empty; remove the key"),
        ({"scheduler": [1]}, "should be a mapping, but it is [1] (a list)"),
        ({"model": {}}, "args.model.source: missing"),
        ({"model": {"source": ""}}, "args.model.source: "),
    ],
)
def test_each_message_has_what_would_work(args: dict[str, Any], words: str) -> None:
    (problem,) = problems_of(MINIMAL | args)
    assert words in problem


def test_a_device_may_name_the_class_of_a_backend() -> None:
    assert parse_args(MINIMAL | {"device": "package.module:Class"}).device == "package.module:Class"


def test_whole_numbers_and_lists_are_taken_where_they_mean_the_same() -> None:
    config = parse_args(MINIMAL | {"placement": {"wait_s": 3}, "parallel": {"layers_per_stage": [3, 4]}})
    assert config.placement.wait_s == 3.0
    assert config.parallel.layers_per_stage == (3, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("applications: []\nhttp_options: {port: 1, port: 2}\n", "line 2: the key 'port' stands twice"),
        ("applications: [\n", "line 2: "),
        ("- 1\n", "expects a mapping at the top, got [1] (a list)"),
        ("", "expects a mapping at the top, got empty"),
        ("model: {source: x}\n", "applications: missing or empty, so this is no Serve config file"),
        ("applications: [3]\n", "applications.0: expects a mapping, got 3 (an integer)"),
        ("applications: [{args: text}]\n", "applications.0.args: expects a mapping"),
        ("applications: [{name: a}]\n", "args.model: missing"),
        ("applications: [{args: !!python/object/apply:os.getcwd []}]\n", "line 1: could not determine a constructor"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: cannot be read .*configs/demo\.yaml"):
        read_config(tmp_path / "nowhere.yaml")


def test_merged_and_repeated_keys_of_different_mappings_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, "a: &x {port: 1, host: b}\nb: {<<: *x, port: 2}\n")
    assert read_document(path)["b"] == {"port": 2, "host": "b"}
