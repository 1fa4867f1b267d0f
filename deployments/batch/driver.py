"""Drives a job from its input to its files: what is asked is checked first, then computed, then published."""

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from configs.config import Config
from deployments.batch.identity import Identity, config_sha256
from deployments.batch.ids import survey_with_ids
from deployments.batch.job import Job
from deployments.batch.lease import Lease
from deployments.batch.manifest import (
    Done,
    Manifest,
    check_manifest,
    identity_of,
    read_done,
    read_manifest,
    write_manifest,
)
from deployments.batch.rows import Answerer, Tally
from deployments.batch.source import Source
from deployments.batch.store import Store

PART_ROWS = 128

Answering = Callable[[Identity, Tally, Job], AbstractContextManager[Answerer]]


@dataclass(frozen=True)
class Asked:
    """What a job is asked to do."""

    input: str  # a path or a URL
    output: str
    errors: str
    day: date | None = None  # none: that of the job, and for a new one today
    part_rows: int | None = None  # none: those of the job, and for a new one PART_ROWS


@dataclass(frozen=True)
class Summary:
    """What came of a job, over all runs."""

    rows: int
    completed: int
    failed: int
    skipped: int  # of the rows above, those that earlier runs had ended
    output: str
    errors: str


@dataclass(frozen=True)
class Prepared:
    """A job whose input and config have been checked."""

    asked: Asked
    store: Store
    source: Source
    manifest: Manifest
    model: str
    max_row_bytes: int


def prepare(asked: Asked, config: Config, folder: Path, store: Store) -> Prepared:
    """Read the input once, and compare it with the job that is there. Writes nothing.

    `folder` holds the checkpoint. Raises ValueError for an input that cannot be read, ids that stand twice, another job
    under this output, or a file in its place.
    """
    there = read_manifest(store)
    part_rows = asked.part_rows or (there.part_rows if there else PART_ROWS)
    day = asked.day or (there.day if there else datetime.now(UTC).date())
    max_row_bytes = config.admission.body_bytes(config.model.max_model_len or _longest_context(folder))
    source = Source(asked.input, part_rows, max_row_bytes)
    survey_with_ids(source)
    if not source.num_rows:
        raise ValueError(f"--input: {asked.input} has no rows; write one a line")
    manifest = Manifest(source.sha256, config_sha256(config, folder), day, part_rows, source.num_rows, asked.errors)
    check_manifest(store, there, manifest)
    for option, path in (("--output", asked.output), ("--errors", asked.errors)):
        if there is None and store.exists(path):
            raise ValueError(f"{option}: {path} is there, and no job that goes on; move it, or name another file")
    return Prepared(asked, store, source, manifest, config.served_name, max_row_bytes)


def _longest_context(folder: Path) -> int:
    """The tokens that the checkpoint says a context has, so that rows may be as large as bodies of HTTP; else 0.

    Before a gang starts nothing more is known; whoever reads the model says what is wrong with its config.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        says = json.loads((folder / "config.json").read_bytes())
        for part in (says, says.get("text_config") or {}):
            if isinstance(num_tokens := part.get("max_position_embeddings"), int):
                return num_tokens
    return 0


def drive(job: Prepared, answering: Answering) -> Summary:
    """Go on with a job, or begin it, to its end. `answering` brings what answers rows; only if any are left.

    Raises ValueError where it cannot go on, or another driver works on it; what is done is kept.
    """
    with Lease(job.store) as lease:
        write_manifest(job.store, job.manifest)
        done = read_done(job.store)
        if done is not None:
            skipped = done.rows
        else:
            job.store.sweep()
            done, skipped = _compute(job, lease, answering)
        _tidy(job)
    return Summary(done.rows, done.completed, done.failed, skipped, job.asked.output, job.asked.errors)


def _compute(job: Prepared, lease: Lease, answering: Answering) -> tuple[Done, int]:
    identity = identity_of(job.manifest)
    run = Job(job.store, job.source, identity, lease, job.model, job.max_row_bytes)
    if not run.is_computed:
        with answering(identity, run.tally, run) as answerer:
            run.run(answerer)
    return run.publish(job.asked.output, job.asked.errors), run.tally.skipped


def _tidy(job: Prepared) -> None:
    """Remove the parts of a job that is done, once its files are there. Raises ValueError where they are not."""
    for path in (job.asked.output, job.asked.errors):
        if not job.store.exists(path):
            raise ValueError(
                f"{path}: was written, and is gone; to compute it again, remove {job.store.folder} and start anew"
            )
    for name in job.store.sizes():
        if name.startswith(("part-", "journal-")):
            job.store.remove(name)
