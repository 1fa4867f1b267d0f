"""Runs one function of a test file in several rank processes at once, and tells what came of each."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ANSWER_S = 60.0
# Imported once, by the server that forks the ranks: what every scenario imports
PRELOADED = ["torch", "torch.distributed", "pytest", "cluster.collectives.groups", "cluster.collectives.shared_memory"]


def run_ranks(file: str, scenario: str, num_ranks: int, **arguments: Any) -> list[tuple[str, Any]]:
    """By rank: ("ok", result), ("TypeOfError", text), or ("dead", exit code)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe(duplex=False)
        job = {"JOB": (file, scenario, rank, arguments), "CONNECTION": theirs}
        process = context.Process(target=runpy.run_path, args=(__file__, job, "rank_process"), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    answers = []
    try:
        for rank, (process, connection) in enumerate(started):
            assert connection.poll(ANSWER_S), f"rank {rank} did not answer"
            try:
                answers.append(connection.recv())
            except EOFError:
                process.join(ANSWER_S)
                answers.append(("dead", process.exitcode))
    finally:
        for process, _ in started:
            process.join(1 if sys.exc_info()[0] else ANSWER_S)
            if process.is_alive():
                process.kill()
    return answers


if __name__ == "rank_process":
    import torch

    torch.set_num_threads(1)
    path, name, own_rank, options = globals()["JOB"]
    try:
        answer = ("ok", runpy.run_path(str(Path(path)), run_name="scenarios")[name](own_rank, **options))
    except Exception as error:
        answer = (type(error).__name__, str(error))
    globals()["CONNECTION"].send(answer)
