"""The command `stagemesh batch`: what it prints, its exit codes, and what a signal leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from deployments import cli
from deployments.batch import answerer, journal
from deployments.batch.store import LocalStore
from tests.fakes.batch_jobs import MODEL, Desk, some_rows
from tests.fakes.fake_answerer import FakeAnswerer
from tests.serving import ROOT


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    desk.write(some_rows(20))
    args = {"model": {"source": str(tmp_path / "checkpoint"), "name": MODEL}}
    application = {"name": "x", "import_path": "deployments.app:build_app", "args": args}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    return desk


@pytest.fixture
def batch(desk, monkeypatch):
    """Runs the command with a fake in the gangs' place → its exit code."""
    monkeypatch.setattr("deployments.gangs.connected_to_ray", lambda namespace: contextlib.nullcontext())

    def run(*more, fake=None, config="config.yaml", name="in.jsonl"):
        monkeypatch.setattr(answerer, "GangAnswerer", lambda config, now, progress, agree: fake or FakeAnswerer())
        folder = desk.folder
        where = ["--input", str(folder / name), "--output", str(folder / "out.jsonl")]
        return cli.main(["batch", str(folder / config), *where, *more])

    return run


def test_a_job_and_the_same_again(batch, desk, capsys):
    assert batch(fake=FakeAnswerer(before=lambda row: print("a word of Ray's"))) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "20 rows are done: 16 completed, 4 failed; answers in " in told and "4 error rows in " in told
    assert batch("--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == {
        "rows": 20,
        "completed": 16,
        "failed": 4,
        "skipped": 20,
        "output": str(desk.folder / "out.jsonl"),
        "errors": str(desk.folder / "out.errors.jsonl"),
    }


def test_mistakes_are_said_before_anything_starts(batch, desk, capsys):
    assert batch(name="none.jsonl") == 2
    assert "is no file; name a JSONL or Parquet file" in capsys.readouterr().err
    assert batch(config="none.yaml") == 2
    assert "name a Serve config file" in capsys.readouterr().err
    for words in ("--date", "31.1.2026"), ("--part-rows", "0"):
        with pytest.raises(SystemExit) as raised:
            batch(*words)
        assert raised.value.code == 2


def test_what_cannot_go_on_is_1_and_goes_on_later(batch, capsys):
    def fail(row):
        if row.number > 10:
            raise ValueError("the gang is lost; start the same command again")

    assert batch(fake=FakeAnswerer(before=fail)) == 1
    assert "start the same command again" in capsys.readouterr().err
    assert batch() == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_down_what_has_ended_before_anything_is_torn_down(batch, desk, monkeypatch, capfd, signum):
    monkeypatch.setattr(journal, "_SAVE_S", 1e9)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    answered, at_teardown = [], []

    class Stopped(FakeAnswerer):
        def run(self, rows):
            try:
                yield from super().run(rows)
            finally:
                at_teardown.extend(desk.folder.glob("out.jsonl.parts/journal-*"))

    def stop(row):
        if len(answered) == 9:
            os.kill(os.getpid(), signum)
        answered.append(row.custom_id)

    assert batch("--part-rows", "100", fake=Stopped(before=stop)) == 128 + signum
    assert "start the same command again to go on" in capfd.readouterr().err
    assert at_teardown and [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    second = FakeAnswerer()
    assert batch(fake=second) == 0
    assert len(second.answered) == 16 - 9


@pytest.mark.parametrize("when", ["init", "publish", "shutdown"])
def test_sigterm_is_143_beside_the_handler_that_ray_sets(batch, monkeypatch, when):
    def stop(moment):
        if moment == when:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def connected(namespace):
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
        stop("init")
        yield
        stop("shutdown")

    publish = LocalStore.publish
    monkeypatch.setattr("deployments.gangs.connected_to_ray", connected)
    monkeypatch.setattr(LocalStore, "publish", lambda *args: (stop("publish"), publish(*args)))
    before = signal.getsignal(signal.SIGTERM)
    assert batch() == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_module_is_the_same_command():

    done = subprocess.run([sys.executable, "-m", "deployments.batch", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--part-rows" in done.stdout
