"""The command `stagemesh`; `python -m deployments.cli` is the same."""

import argparse
import sys

from deployments.batch import command as batch_command
from deployments.bench import command as bench_command
from deployments.bench import profile
from deployments.doctor import command as doctor_command
from deployments.plan import command as plan_command
from deployments.verify import command as verify_command


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="stagemesh",
        description="Plan, examine, verify, measure and run batches of large models on Ray, in shards and stages.",
        epilog="To serve one: make serve CONFIG=configs/demo.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan_command.add_to(commands)
    doctor_command.add_to(commands)
    verify_command.add_to(commands)
    profile.add_to(commands)
    bench_command.add_to(commands)
    batch_command.add_to(commands)
    options = parser.parse_args(argv)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
