"""The stages of gpu_check.py in order of value, how long each may take, and the process that runs one."""

import contextlib
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT = 512  # tokens of each sequence before the decode steps that are measured, and of a prompt through HTTP


class Stage(NamedTuple):
    name: str
    limit_s: float
    what: str
    where: str  # module:function
    needs: str | None = None  # the stage without which it cannot run


STAGES = [
    Stage("numerics", 50, "the tests of the GPU, in order of value", "numerics:run"),
    Stage("decode_8b", 40, "decode steps of Llama 8B", "decode:run_8b"),
    Stage("decode_70b", 35, "decode steps of one shard of eight of Llama 70B", "decode:run_70b"),
    Stage("attention", 15, "paged attention alone", "attention:run"),
    Stage("prefill", 20, "chunks of prompts of Llama 8B", "prefill:run"),
    Stage("start", 50, "a server with a random checkpoint of Llama 8B's shape, until it is ready", "server:run"),
    Stage("http", 25, "streams through HTTP", "load:run", needs="start"),
    Stage("kill", 15, "the rank killed under load", "kill:run", needs="start"),
    Stage("transformers", 25, "generate and continuous batching of Transformers", "peers:run"),
]
IMPORTS_S = 15.0  # before the first stage
ENDING_S = 10.0  # to end the server
TOTAL_S = 300.0


class CannotRun(Exception):
    """A stage has nothing to measure here; the message says why."""


@dataclass(frozen=True)
class Job:
    """What one process is told. It has all that it needs, so that it can be started anew from its JSON."""

    stage: str
    device: str
    is_tiny: bool
    folder: str  # for this run's files; the server's checkpoint stays in it until the end
    port: int  # of the server
    limit_s: float
    began: float = field(default_factory=time.monotonic)

    @property
    def is_cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def records(self) -> Path:
        """A JSON object a line, each written as soon as it is known."""
        return Path(self.folder) / f"{self.stage}.jsonl"

    @property
    def log(self) -> Path:
        return Path(self.folder) / f"{self.stage}.log"

    @property
    def left_s(self) -> float:
        """Until the process is ended."""
        return self.began + self.limit_s - time.monotonic()

    def record(self, **row: Any) -> None:
        with self.records.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_stage(job: Job) -> None:
    """Run a stage in this process, which is a fork; where CUDA does not start in a fork, in a fresh interpreter."""
    os.setsid()
    job = replace(job, began=time.monotonic())  # not when it was asked for: imports came between
    parent = os.getppid()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    with job.log.open("ab", buffering=0) as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    if job.is_cuda and not _cuda_starts():
        os.execv(sys.executable, [sys.executable, __file__, json.dumps(asdict(job))])
    _run(job)


def _cuda_starts() -> bool:
    import torch

    with contextlib.suppress(Exception):
        return torch.ones(1, device="cuda").item() == 1.0
    return False


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(job: Job) -> None:
    try:
        stage = next(stage for stage in STAGES if stage.name == job.stage)
        module, _, function = stage.where.partition(":")
        work: Callable[[Job], None] = getattr(importlib.import_module(f"gpu_stages.{module}"), function)
        job.record(machine=machine(job))
        work(job)
    except CannotRun as error:
        job.record(ended="cannot run", reason=str(error))
    except BaseException as error:
        traceback.print_exc()
        job.record(ended="failed", reason=f"{type(error).__name__}: {error}"[:500])
        raise
    else:
        job.record(ended="ok")


def machine(job: Job) -> dict[str, Any]:
    """What the figures were measured on. Raises CannotRun where the device is not there."""
    import torch
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if not job.is_cuda:
        return {"device": "cpu"} | found
    if not torch.cuda.is_available():
        raise CannotRun("torch finds no CUDA device; --device cpu runs on the CPU")
    free, total = torch.cuda.mem_get_info()
    cuda = {"cuda": torch.version.cuda, "free_gb": round(free / 1e9, 1), "total_gb": round(total / 1e9, 1)}
    return {"device": torch.cuda.get_device_name()} | cuda | found


if __name__ == "__main__":  # see run_stage
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _run(Job(**json.loads(sys.argv[1])))
