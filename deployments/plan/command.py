"""`stagemesh plan`: what will go where, how much memory it takes, how fast it can be; before anything starts.

    stagemesh plan CONFIG [--gpu NAME] [--tp N] [--pp N] [--dtype NAME] [--max-model-len TOKENS] [--json]

Needs no GPU, no Ray, no weights and no network: the architecture is enough. Exit codes: 0 the plan fits, 1 it does not
fit or there is no valid plan, 2 a mistake on the command line.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.decisions.model.accelerators import ACCELERATORS
from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import DTYPES, ModelSpec
from actors.tensors.backends.choose import default_block_size, placed_on
from actors.words.errors import UnsupportedModel
from configs.config import Config
from configs.files import parse_args, read_config
from deployments.plan.report import PlanReport, fitted, layouts, make_report, shortfalls
from deployments.plan.text import as_text

_DEFAULT_GPU = "h100-80gb"
_DEFAULT_CONTEXT = 2048  # tokens


def add_to(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "plan",
        help="show what goes where, how much memory it takes, how fast it can be",
        description="Show what goes where, how much memory it takes, how fast it can be. Needs no GPU, and no weights.",
    )
    add_config_to(parser)
    add = parser.add_argument
    names = ", ".join(ACCELERATORS)
    add("--gpu", default=_DEFAULT_GPU, choices=list(ACCELERATORS), metavar="NAME", help=f"{names}; default: the first")
    tokens = f"{_DEFAULT_CONTEXT}, or what the model takes"
    add(
        "--context",
        type=count,
        metavar="N",
        help=f"tokens of each sequence in the estimate of speed; default: {tokens}",
    )
    add("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def add_config_to(parser: argparse.ArgumentParser) -> None:
    """Add the config, and the options that stand in place of keys in it; `asked_config` reads them."""
    add = parser.add_argument
    add("config", help="a Serve config file such as configs/demo.yaml, a model's folder, or a hub id")
    add("--tp", type=count, metavar="N", help="shards, instead of parallel.tensor_parallel_size")
    add("--pp", type=count, metavar="N", help="stages, instead of parallel.pipeline_parallel_size")
    add("--dtype", choices=("auto", *DTYPES), help="instead of model.dtype")
    add("--max-model-len", type=count, metavar="N", help="tokens of the longest request, not model.max_model_len")
    add("--block-size", type=count, metavar="N", help="tokens of a KV block, instead of cache.block_size")


def asked_config(options: argparse.Namespace) -> Config:
    """The Config that a command line asks for. Raises ValueError with a line for each wrong key."""
    sizes = options.tp, options.pp
    return config_of(options.config, *sizes, options.dtype, options.max_model_len, options.block_size)


def run(options: argparse.Namespace) -> int:
    """Print the plan, or every problem that makes it invalid."""
    try:
        config = asked_config(options)
        found = plan_report(config, options.gpu, options.context)
    except ValueError as error:  # UnsupportedModel and CheckpointError are ValueErrors
        return _say_problems(str(error).splitlines(), isinstance(error, UnsupportedModel), options.json)
    if options.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    else:
        sys.stdout.write(as_text(found))
    return 1 if found.problems else 0


def plan_report(config: Config, gpu: str, context: int | None = None) -> PlanReport:
    """The plan of a config on an accelerator. Raises ValueError with every problem, or UnsupportedModel."""
    from actors.tensors.model.spec_reader import read_spec  # the model is built to be read: torch is imported only here
    from actors.tensors.weights.source import architecture_folder
    from deployments.api.sampling_defaults import SamplingDefaults

    folder, is_shipped = architecture_folder(config.model)
    SamplingDefaults.read(folder, config.model.generation_config)  # where a start would refuse them, so does a plan
    spec = read_spec(folder, config.model.dtype)
    plan = fitted(config, assumed_plan(config, spec), ACCELERATORS[gpu])
    if context is not None and context > plan.max_model_len:
        raise ValueError(f"--context: {context} tokens, but model.max_model_len is {plan.max_model_len}; ask for fewer")
    context = context or min(_DEFAULT_CONTEXT, plan.max_model_len)
    source = "the public values that are shipped" if is_shipped else str(folder / "config.json")
    found = make_report(config, plan, ACCELERATORS[gpu], context, source)
    return dataclasses.replace(
        found,
        notes=(*found.notes, *_doubts(config.model.source, folder)),
        layouts=layouts(config, spec, ACCELERATORS[gpu], context, plan.block_size),
        problems=shortfalls(config, plan, ACCELERATORS[gpu]),
    )


def assumed_plan(config: Config, spec: ModelSpec) -> Plan:
    """The plan where no cluster is asked for its devices: `auto` stands for GPUs. Raises as `make_plan`."""
    placed = placed_on(config.device)
    return make_plan(config, spec, default_block_size(config.device, "cuda" if placed == "auto" else placed))


def _doubts(source: str, folder: Path) -> list[str]:
    """What the name of a model speaks of, and no file does; where there are weights, loading knows."""
    from actors.tensors.model.quantization import method_in_name

    method = method_in_name(source)
    if method is None or any(folder.glob("*.safetensors")):
        return []
    doubt = (
        f"the model's name speaks of {method}, but config.json does not, and no hf_quant_config.json is beside "
        "it: this is the plan of unquantized weights, and quantized ones are refused"
    )
    return [doubt]


def is_config_file(target: str) -> bool:
    """Whether a target is a config file, and not a model's folder or hub id."""
    return target.endswith((".yaml", ".yml"))


def config_of(
    target: str,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    dtype: str | None = None,
    max_model_len: int | None = None,
    block_size: int | None = None,
) -> Config:
    """The Config of a config file, or the defaults for a model (folder or hub id); what is given overrides it.

    Raises ValueError with a line for each wrong key.
    """
    is_file = is_config_file(target)
    config = read_config(Path(target)) if is_file else Config.model_validate({"model": {"source": target}})
    sizes = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
    given: dict[str, Mapping[str, str | int | None]] = {
        "model": {"dtype": dtype, "max_model_len": max_model_len},
        "parallel": sizes,
        "cache": {"block_size": block_size},
    }
    args = config.model_dump()
    for group, keys in given.items():
        args[group].update({key: value for key, value in keys.items() if value is not None})
    if any(sizes.values()):
        args["parallel"]["layers_per_stage"] = None
    return parse_args(args, where=target)


def count(text: str) -> int:
    """Parse a whole number of the command line that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)


def _say_problems(problems: list[str], is_unsupported: bool, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"problems": problems}, indent=2) + "\n")
    else:
        sys.stderr.write("This model cannot be served:\n" if is_unsupported else "There is no valid plan:\n")
        sys.stderr.write("".join(f"  - {problem}\n" for problem in problems))
    return 1
