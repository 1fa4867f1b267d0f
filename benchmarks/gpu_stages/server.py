"""Starts `make serve` with a random checkpoint, and says how long each phase takes until it is ready."""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

from gpu_stages.random_checkpoint import write_checkpoint
from gpu_stages.stages import CONTEXT, Job

ROOT = Path(__file__).resolve().parents[2]
NAME = "random"
POLL_S = 0.05
SAID = re.compile(r"^\[ *([\d.]+) s\] (.+)$", re.MULTILINE)  # lines of the command, with seconds since its start
TOOK = re.compile(r"((?:all ranks have|rank 0 has) .+) \(([\d.]+) s\)$", re.MULTILINE)  # and of the gang


def run(job: Job) -> None:
    folder = Path(job.folder) / "model"
    folder.mkdir()
    began = time.monotonic()
    num_bytes = write_checkpoint(folder, *(("tiny", "float32") if job.is_tiny else ("llama8b", "bfloat16")))
    written_s = time.monotonic() - began
    job.record(checkpoint_gb=num_bytes / 1e9, written_s=written_s, gb_per_s=num_bytes / written_s / 1e9)
    config, log = Path(job.folder) / "serve.yaml", Path(job.folder) / "serve.log"
    config.write_text(yaml.safe_dump(document(job, folder)))
    began = time.monotonic()
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "deployments.serve.command", str(config)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "RAY_ADDRESS": "local"},
            stdout=file, stderr=file, start_new_session=True, cwd=ROOT,
        )  # fmt: skip
    job.record(server_pid=server.pid)  # who ends it
    while not is_ready(job.port):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text()[-400:]}")
        time.sleep(POLL_S)
    ready_s = time.monotonic() - began
    replica_s = time.time() - replica_created()
    for at_s, what in SAID.findall(log.read_text()):
        job.record(phase=what, at_s=float(at_s))
    for what, seconds in TOOK.findall(log.read_text()):
        job.record(phase=what, took_s=float(seconds))
    job.record(ready_s=ready_s, replica_to_ready_s=replica_s)


def document(job: Job, folder: Path) -> dict[str, Any]:
    """A Serve config file."""
    arguments: dict[str, Any] = {
        "model": {"source": str(folder), "name": NAME, "max_model_len": 2 * CONTEXT + 128},
        "device": job.device.partition(":")[0],
        "scheduler": {"max_num_seqs": 8 if job.is_tiny else 256},
    }
    if not job.is_cuda:
        arguments |= {"cache": {"num_blocks": 512}, "placement": {"cpus_per_rank": 0.5, "cpus_per_replica": 0.5}}
    application = {"name": NAME, "route_prefix": "/", "import_path": "deployments.app:build_app", "args": arguments}
    http = {"host": "127.0.0.1", "port": job.port}
    return {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}


def is_ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
    except (OSError, urllib.error.HTTPError):
        return False
    return True


def replica_created() -> float:
    """When the replica's process was created, in seconds since 1970; Ray names its processes."""
    for process in psutil.process_iter(["cmdline", "create_time"]):
        if any("ServeReplica" in word for word in process.info["cmdline"] or []):
            return float(process.info["create_time"])
    return float("nan")
