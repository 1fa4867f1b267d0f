"""`stagemesh verify`: whether the layout that would be served computes what plain Transformers does, on this machine.

    stagemesh verify CONFIG [--tp N] [--pp N] [--dtype NAME] [--prompts FILE] [--output-len N] [--json]

Starts the gang of the config on Ray, without HTTP. Exit codes: 0 right, 1 wrong, or the gang could not run, 2 a
mistake on the command line or a config that has no valid plan, 130 interrupted.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.plan.command import add_config_to, asked_config, assumed_plan, count, is_config_file

if TYPE_CHECKING:
    from actors.decisions.model.spec import ModelSpec
    from configs.config import Config
    from deployments.verify.prompts import Prompts
    from deployments.verify.report import VerifyReport

_OUTPUT_LEN = 16  # tokens


def add_to(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "verify",
        help="compare a layout with plain Transformers on this machine",
        description="Serve prompts by the layout of a config, and compare what every rank computes with plain "
        "Transformers on the same checkpoint, in the same dtype. Says the first layer and tensor that differ.",
    )
    add_config_to(parser)
    add = parser.add_argument
    add("--prompts", type=Path, metavar="FILE", help="a text a line, or JSON lines with `prompt`; default: random ids")
    add("--output-len", type=count, metavar="N", default=_OUTPUT_LEN, help=f"tokens after each; default: {_OUTPUT_LEN}")
    add("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify, and print the verdict."""
    try:
        config = _with_shared_cores(asked_config(options), options.config)
        spec, prompts, num_new = _prepared(config, options)
    except ValueError as error:  # UnsupportedModel and CheckpointError are ValueErrors
        sys.stderr.write(f"{error}\n")
        return 2
    from deployments.verify.run import verify
    from deployments.verify.text import as_text

    try:
        report = verify(config, spec, prompts, num_new)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    sys.stdout.write(_as_json(report) if options.json else as_text(report))
    return 0 if report.verdict == "right" else 1


def _with_shared_cores(config: "Config", target: str) -> "Config":
    """For a model that is named without a config file: its ranks may share cores, as nothing is timed here."""
    from configs.config import PlacementConfig

    if is_config_file(target):
        return config
    few = PlacementConfig(cpus_per_rank=0.01, cpus_per_replica=0.01)
    return config.model_copy(update={"placement": few})


def _prepared(config: "Config", options: argparse.Namespace) -> "tuple[ModelSpec, Prompts, int]":
    """The model, the prompts, and how many tokens come after each. Raises ValueError for what cannot be planned."""
    from actors.tensors.model.spec_reader import read_spec
    from actors.tensors.weights.source import resolve_source
    from deployments.verify.prompts import default_prompts, read_prompts

    folder = resolve_source(config.model)
    spec = read_spec(folder, config.model.dtype)
    plan = assumed_plan(config, spec)
    num_new = min(options.output_len, plan.max_model_len - 1)
    if options.prompts is None:
        return spec, default_prompts(plan, num_new), num_new
    return spec, read_prompts(options.prompts, folder, plan, num_new), num_new


def _as_json(report: "VerifyReport") -> str:
    first = report.first_difference
    said = {
        "verdict": report.verdict,
        "first_difference": None if first is None else dataclasses.asdict(first),
        "remedy": report.remedy,
        **dataclasses.asdict(report),
    }
    return json.dumps(_plain(said), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Sets as sorted lists; null where something is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | frozenset):
        return [_plain(one) for one in (sorted(value) if isinstance(value, frozenset) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
