"""How long `make serve` takes until it is ready, beside what nobody can avoid.

    python benchmarks/startup.py [configs/demo.yaml] --rounds 5

What nobody can avoid: an empty Serve application on a Ray that is started for it, plus as many parallel imports of
torch and Transformers as the replica and its ranks need. In turn; medians and the ratio; the last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import ROOT, Server

from configs.files import read_config

EMPTY = """
import signal, time
import ray
from ray import serve
from starlette.requests import Request

@serve.deployment
class Empty:
    def __call__(self, request: Request) -> str:
        return "here"

ray.init(include_dashboard=False, logging_level="WARNING")
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Empty.bind())
signal.pause()
"""
IMPORTS = "import torch, transformers; from transformers import AutoModelForCausalLM, AutoTokenizer; AutoTokenizer"


def started_s(command: list[str], port: int, probe: str) -> float:
    began = time.monotonic()
    server = Server("server", f"http://127.0.0.1:{port}", probe, command, {})
    try:
        server.wait(poll_s=0.1)
        return time.monotonic() - began
    finally:
        server.close()


def imports_s(count: int) -> float:
    began = time.monotonic()
    for process in [subprocess.Popen([sys.executable, "-c", IMPORTS]) for _ in range(count)]:
        if process.wait(timeout=300):
            raise SystemExit("torch or transformers cannot be imported")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml", help="its port is 8000")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parallel = read_config(ROOT / options.config).parallel
    num_processes = 1 + parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    ours = [sys.executable, "-m", "deployments.serve.command", options.config]
    empty = [sys.executable, "-c", EMPTY.replace("PORT", "8000")]
    runs: list[tuple[float, float, float]] = []
    for number in range(options.rounds):
        run = started_s(ours, 8000, "/ready"), started_s(empty, 8000, "/"), imports_s(num_processes)
        runs.append(run)
        print(
            f"round {number + 1}: ours {run[0]:.1f} s; empty Serve {run[1]:.1f} s + imports {run[2]:.1f} s", flush=True
        )
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    ratio = medians[0] / (medians[1] + medians[2])
    print(f"ours / (empty Serve + {num_processes} imports) = {ratio:.2f}")
    print(json.dumps({"ours_s": medians[0], "empty_serve_s": medians[1], "imports_s": medians[2], "ratio": ratio}))


if __name__ == "__main__":
    main()
