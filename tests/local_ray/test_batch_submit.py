"""A batch as a Ray job, against a head of its own: stopped by `ray job stop`, submitted again, and whole."""

import json
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.chaos.batch_runs import Bench
from tests.serving import ROOT, free_port, until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def dashboard(tmp_path_factory, monkeypatch):
    """The URL at which a head takes jobs."""
    port, dashboard = free_port(), free_port()
    folder = tmp_path_factory.mktemp("r")
    command = [RAY, "start", "--head", "--block", "--port", str(port), "--dashboard-port", str(dashboard)]
    command += [
        "--num-cpus",
        "4",
        "--num-gpus",
        "0",
        "--temp-dir",
        str(folder),
        "--ray-client-server-port",
        str(free_port()),
    ]
    command += ["--dashboard-agent-listen-port", str(free_port()), "--disable-usage-stats"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        until(lambda: "JOB" in job(url, "list", fine=False).upper() or head.poll() is not None, every_s=2)
        yield url
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def job(dashboard, *words, fine=True):
    """`ray job WORDS` → what it prints."""
    command = [RAY, "job", words[0], "--address", dashboard, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not fine or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(dashboard, name, bench, output):
    job(dashboard, "submit", "--no-wait", "--submission-id", name, "--", sys.executable, *bench.command(output))


def test_stopped_and_submitted_again(tmp_path, dashboard):
    bench = Bench(tmp_path)
    bench.write(800, (1, 1), scheduler={"max_num_seqs": 8})
    submit(dashboard, "plain", bench, "plain.jsonl")
    until(lambda: "succeeded" in job(dashboard, "status", "plain").lower(), every_s=1)

    submit(dashboard, "first", bench, "out.jsonl")
    until(lambda: bench.saved("out.jsonl"))
    job(dashboard, "stop", "first")
    assert "stopped" in job(dashboard, "status", "first").lower()
    assert "stopping; what is done is kept" in job(dashboard, "logs", "first")
    assert not (tmp_path / "out.jsonl").exists()

    submit(dashboard, "second", bench, "out.jsonl")
    until(lambda: "succeeded" in job(dashboard, "status", "second").lower(), every_s=1)
    assert bench.files("out.jsonl") == bench.files("plain.jsonl")
    [summary] = [line for line in job(dashboard, "logs", "second").splitlines() if '"completed"' in line]
    assert 0 < json.loads(summary)["skipped"] < 800
