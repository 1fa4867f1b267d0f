"""`stagemesh batch`: answers every row of a file, without HTTP; killed anywhere, the same command goes on.

    stagemesh batch CONFIG --input IN --output OUT [--errors ERR] [--date YYYY-MM-DD] [--part-rows N] [--json]
    python -m deployments.batch ...     the same; for `ray job submit`

Exit codes: 0 every row has its line (those that failed in ERR), 1 it could not go on, and what is done is kept, 2 a
mistake on the command line, in the config or in the input, 130 and 143 interrupted.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING, Any

from deployments.plan.command import count

if TYPE_CHECKING:
    from deployments.batch.driver import Answering, Prepared, Summary
    from deployments.batch.identity import Identity
    from deployments.batch.job import Job
    from deployments.batch.rows import Answerer, Tally


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Stopped(BaseException):
    """A signal has come, and what has ended is written down."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def add_to(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "batch",
        help="answer every row of a file, once, however often it is killed",
        description="Answer every row of a file on gangs that are started for it, without HTTP. Killed anywhere, and "
        "started again with the same command, it goes on.",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the sub-command and `python -m deployments.batch` share."""
    add = parser.add_argument
    add("config", help="a Serve config file such as configs/demo.yaml")
    add("--input", required=True, metavar="IN", help="JSONL or Parquet: a path, or a URL such as s3://bucket/in.jsonl")
    add("--output", required=True, metavar="OUT", help="where the answers go, in the order of the rows: a path or URL")
    add("--errors", metavar="ERR", help="where rows go that cannot be answered; default: OUT with .errors in its name")
    add("--date", type=_day, metavar="DAY", help="of the answers, and what chat templates print; default: today (UTC)")
    add("--part-rows", type=count, metavar="N", help="rows of a part of OUT while the job runs; default: 128")
    add("--json", action="store_true", help="print progress and summary as JSON lines")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the job, and print what came of it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        with _stopping_at_signals():
            try:
                job, answering = _prepared(options)
            except (ValueError, OSError) as error:
                sys.stderr.write(f"{error}\n")
                return 2
            return _run(job, answering, options.json)
    except _Stopped as stopped:
        return 128 + stopped.signum
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        return 128 + signal.SIGTERM  # it came while Ray's own handler was set


def _prepared(options: argparse.Namespace) -> "tuple[Prepared, Answering]":
    """The job, and what answers its rows. Raises ValueError for what cannot be."""
    from actors.tensors.weights.source import resolve_source
    from configs.files import read_config
    from deployments.batch.driver import Asked, prepare
    from deployments.batch.places import default_errors, normalized, open_store
    from deployments.gangs import connected_to_ray

    config = read_config(options.config)
    output = normalized(options.output, "--output")
    errors = normalized(options.errors, "--errors") if options.errors else default_errors(output)
    asked = Asked(normalized(options.input, "--input"), output, errors, options.date, options.part_rows)
    folder = resolve_source(config.model)
    job = prepare(asked, config, folder, open_store(output, errors))

    @contextlib.contextmanager
    def answering(identity: "Identity", tally: "Tally", run: "Job") -> "Iterator[Answerer]":
        from deployments.batch.answerer import GangAnswerer
        from deployments.batch.progress import Progress

        ours = {one: signal.getsignal(one) for one in _SIGNALS}
        with connected_to_ray("batch"):
            for one, handler in ours.items():  # Ray has set its own
                signal.signal(one, handler)
            with _stopping_at_signals(run):
                progress = Progress(tally, sys.stderr, "json" if options.json else "auto")
                yield GangAnswerer(config, identity.now, progress, run.agree_on_length)

    return job, answering


def _run(job: "Prepared", answering: "Answering", as_json: bool) -> int:
    from deployments.batch.driver import drive

    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints there when a process dies; the summary stands alone
            summary = drive(job, answering)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(dataclasses.asdict(summary)) + "\n" if as_json else _as_text(summary))
    return 0


def _as_text(summary: "Summary") -> str:
    before = f", {summary.skipped} of them by earlier runs" if summary.skipped else ""
    failed = f"{summary.failed} error rows in {summary.errors}" if summary.failed else "no row failed"
    return (
        f"{summary.rows} rows are done{before}: {summary.completed} completed, {summary.failed} failed; "
        f"answers in {summary.output}; {failed}\n"
    )


@contextlib.contextmanager
def _stopping_at_signals(job: "Job | None" = None) -> Iterator[None]:
    """SIGINT and SIGTERM write down what has ended, and end the block with _Stopped; a second one ends at once.

    `ray job stop` sends SIGTERM, and three seconds later SIGKILL: so that comes before anything is torn down.
    """

    def stop(signum: int, frame: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        if job is not None:
            job.save()
        os.write(2, b"\nstopping; what is done is kept: start the same command again to go on\n")  # not a buffer's lock
        raise _Stopped(signum)

    before = {one: signal.signal(one, stop) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            if job is None or signal.getsignal(one) is stop:  # a second signal ends the teardown within too
                signal.signal(one, handler)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: is no day; write it as 2026-01-31") from None
