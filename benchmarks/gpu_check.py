"""What one GPU shows in five minutes: right numbers, speed beside its limits, a server under load, a killed rank.

    python benchmarks/gpu_check.py                              # everything, at most 300 s
    python benchmarks/gpu_check.py --only decode_8b http        # some stages (and those that they need)
    python benchmarks/gpu_check.py --skip transformers
    python benchmarks/gpu_check.py --device cpu --tiny          # that every stage works, on a machine without a GPU

Runs from a folder that is not installed, with torch 2.11 or newer. Each stage is a process of its own with a time
limit, in order of value; what it measures is in the JSON file as soon as it is known, also when the run is cut off. At
the end, and then too, it prints the goals beside what was measured, and a table of each stage. Weights are random. Exit
codes: 0 all stages ran, 1 one did not, 130 cut off.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = [str(ROOT), str(ROOT / "benchmarks")]
sys.path[:0] = HERE

from gpu_stages import table  # noqa: E402
from gpu_stages.stages import ENDING_S, STAGES, TOTAL_S, Job, Stage, run_stage  # noqa: E402

from deployments.serve.descendants import adopt_orphans, end_children  # noqa: E402

NAMES = [stage.name for stage in STAGES]
POLL_S = 0.1
IMPORTED_ONCE = ["torch", "transformers", "gpu_stages.decode", "gpu_stages.prefill", "gpu_stages.peers",
                 "gpu_stages.random_checkpoint", "transformers.models.llama.modeling_llama"]  # fmt: skip
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its workers would outlive a stage
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not start CUDA before a process forks
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class CutOff(BaseException):
    """A signal ends the run."""


class Check:
    """The run: its results so far, and the server while it runs."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.server_pid: int | None = None
        self.port = free_port()
        self.began = time.monotonic()
        self.results: dict[str, Any] = {
            "commit": commit(),
            "device": args.device,
            "is_tiny": args.tiny,
            "machine": {},
            "goals": [],
            "stages": {},
        }

    def run(self, stages: list[Stage]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        for stage in stages:
            found = {"what": stage.what, "state": "running", "reason": "", "seconds": 0.0, "rows": []}
            self.results["stages"][stage.name] = found
            self.write()
            began = time.monotonic()
            try:
                self.run_one(stage, found, context)
            except CutOff:
                found.update(state="cut off")
                raise
            finally:
                found["seconds"] = time.monotonic() - began
                self.write()
                print(f"{stage.name}: {found['state']}, {found['seconds']:.1f} s {found['reason']}", flush=True)

    def run_one(self, stage: Stage, found: dict[str, Any], context: Any) -> None:
        """Run a stage in a process of its own."""
        if stage.needs and self.results["stages"].get(stage.needs, {}).get("state") != "ok":
            found.update(state="cannot run", reason=f"{stage.needs} did not end well")
            return
        left_s = self.args.patience * (TOTAL_S - ENDING_S) - (time.monotonic() - self.began)
        limit_s = max(0.0, min(self.args.patience * stage.limit_s, left_s))
        job = Job(stage.name, self.args.device, self.args.tiny, str(self.folder), self.port, limit_s)
        process = context.Process(target=run_stage, args=(job,))
        process.start()  # for the first one, what all stages import is imported before this returns
        try:
            deadline = time.monotonic() + limit_s
            while process.is_alive() and time.monotonic() < deadline:
                process.join(POLL_S)
                self._read(job, found)
            if process.is_alive():
                found.update(state="out of time", reason=f"more than {limit_s:.0f} s")
        finally:
            end(process)
            self._read(job, found)
        if found["state"] == "running":
            found.update(state="failed", reason=f"its process ended with {process.exitcode}")
        if found["state"] == "failed" and job.log.exists():
            found["log"] = job.log.read_text(errors="replace")[-4000:]

    def _read(self, job: Job, found: dict[str, Any]) -> None:
        """Take over what a stage has recorded; a line that is not whole yet is left for later."""
        if not job.records.exists():
            return
        text = job.records.read_text()
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        shown = [row for row in rows if not {"machine", "ended", "server_pid"} & set(row)]
        for row in rows:
            self.results["machine"] |= row.get("machine", {})
            self.server_pid = row.get("server_pid", self.server_pid)
            if "ended" in row:
                found.update(state=row["ended"], reason=row.get("reason", ""))
        if len(shown) != len(found["rows"]):
            found["rows"] = shown
            self.write()

    def write(self) -> None:
        """The JSON file; whole at any time."""
        rows = {name: stage["rows"] for name, stage in self.results["stages"].items()}
        self.results["goals"] = table.goals(rows, is_judged=self.args.device != "cpu" and not self.args.tiny)
        self.results["seconds"] = time.monotonic() - self.began
        part = self.args.out.with_name(self.args.out.name + ".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(self.args.out)

    def close(self) -> None:
        """End the server and whatever else runs still."""
        if self.server_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.server_pid, signal.SIGTERM)
            deadline = time.monotonic() + ENDING_S
            while is_there(self.server_pid) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.server_pid, signal.SIGKILL)


def is_there(pid: int) -> bool:
    """Whether a process runs that is our child, or was adopted."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def end(process: BaseProcess) -> None:
    """Kill a stage with all that it started in its session."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(5)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def commit() -> str | None:
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


def chosen(only: list[str] | None, skip: list[str]) -> list[Stage]:
    """The stages to run, in their order: with those that they need."""
    names = set(only or NAMES) - set(skip)
    names = {stage.name for stage in STAGES if stage.name in names and stage.needs not in skip}
    names |= {stage.needs for stage in STAGES if stage.name in names and stage.needs}
    return [stage for stage in STAGES if stage.name in names]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: that the stages work, no figures")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="STAGE", help=", ".join(NAMES))
    parser.add_argument("--skip", nargs="+", choices=NAMES, default=[], metavar="STAGE")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limit of each stage")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="default: gpu_check.json")
    parser.add_argument("--scratch", type=Path, help="folder for the random checkpoint (16 GB); default: the system's")
    return parser.parse_args(arguments)


def cut_off(number: int, frame: object) -> None:
    raise CutOff


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    os.environ.update({"PYTHONPATH": os.pathsep.join([*HERE, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)})
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, cut_off)
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=args.scratch))
    check = Check(args, folder)
    code = 130
    try:
        check.run(chosen(args.only, args.skip))
        code = 0 if all(stage["state"] == "ok" for stage in check.results["stages"].values()) else 1
    except CutOff:
        print("cut off", flush=True)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        check.write()
        print(f"\n{table.text(check.results)}\n{args.out}: all of it as JSON", flush=True)
        check.close()
        end_children(patience_s=0.0)
        shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
