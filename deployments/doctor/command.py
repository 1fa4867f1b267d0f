"""`stagemesh doctor`: looks at the nodes of a cluster and the links between them, before or while something serves.

    stagemesh doctor [CONFIG] [--node] [--json]

Joins the Ray cluster that RAY_ADDRESS names or that runs here, else starts one here and ends it; `--node` looks at this
machine alone, without Ray, as an init container does. Exit codes: 0 nothing fails (there may be warnings), 1 something
fails, 2 a mistake on the command line or in the config, 130 interrupted.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from deployments.plan.command import config_of, is_config_file

if TYPE_CHECKING:
    from deployments.doctor.examine import Question
    from deployments.doctor.findings import Finding


def add_to(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "doctor",
        help="look at nodes, GPUs, links, limits and access, and say what to do",
        description="Look at every node of the Ray cluster, or at this one: GPUs, NVLink, links as measured, ports, "
        "limits, disks, access, versions, environment. Every line has a verdict, and a remedy where it is not ok.",
    )
    add = parser.add_argument
    add("config", nargs="?", help="a Serve config file, a model's folder, or a hub id; default: no model, all GPUs")
    add("--node", action="store_true", help="this machine alone, without Ray")
    add("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine, and print what was found."""
    try:
        question = _question(options.config)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    from deployments.doctor.findings import worst
    from deployments.doctor.text import as_text

    began = time.monotonic()

    def say(words: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - began:4.1f} s] {words}\n")

    try:
        findings = _examine(question, options.node, say)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    say("done")
    sys.stdout.write(_as_json(findings) if options.json else as_text(findings))
    return 1 if worst(findings) == "fail" else 0


def _question(target: str | None) -> "Question":
    from deployments.doctor.examine import Question

    if target is None:
        return Question(None)
    config = config_of(target)
    if not is_config_file(target):
        return Question(config)
    from configs.files import read_application, read_document
    from deployments.serve.endpoint import Endpoint

    return Question(config, Endpoint.of(read_document(target), read_application(target)).port)


def _examine(question: "Question", is_here_only: bool, say: Any) -> "list[Finding]":
    from deployments.doctor.examine import examine_cluster, examine_here

    if is_here_only:
        return examine_here(question, say)
    from deployments.gangs import connected_to_ray
    from deployments.serve.descendants import children

    say("connecting to Ray, or starting it here")
    with connected_to_ray("stagemesh-doctor"):
        return examine_cluster(question, say, is_own=bool(children()))


def _as_json(findings: "list[Finding]") -> str:
    from deployments.doctor.findings import worst

    said = {"verdict": worst(findings), "findings": [dataclasses.asdict(finding) for finding in findings]}
    return json.dumps(said, indent=2, ensure_ascii=False) + "\n"
