"""Ours through HTTP beside Transformers' `tp_plan="auto"` under torchrun, bare, in one run and in turn, A B A B.

    python benchmarks/compare_transformers.py CHECKPOINT --python VENV/bin/python --tp 2 --batch 1 8 --rounds 5

VENV has torch, transformers and accelerate. As many of our requests run at once as their batch is large; all of them
are answered to the full length. Prints medians of tokens/s and the ratio ours / theirs; the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from servers import ROOT, Server, add_layout, measure_by_ours, ours, running


def by_transformers(options: argparse.Namespace) -> dict[int, float]:
    """Tokens/s by batch; a start of its own each time."""
    command = [options.python, "-m", "torch.distributed.run", "--nproc-per-node", str(options.tp)]
    command += [str(ROOT / "benchmarks" / "transformers_generate.py"), str(options.checkpoint)]
    command += ["--input-len", str(options.input_len), "--output-len", str(options.output_len)]
    command += ["--batch", *map(str, options.batch)]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    threads = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=alone | threads)
    if done.returncode:
        raise SystemExit(f"torchrun failed:\n{done.stderr[-3000:]}")
    return {int(batch): rate for batch, rate in json.loads(done.stdout.splitlines()[-1]).items()}


def compare(options: argparse.Namespace, server: Server) -> dict[int, dict[str, float]]:
    runs: dict[int, dict[str, list[float]]] = {batch: {"ours": [], "theirs": []} for batch in options.batch}
    for _ in range(options.rounds):
        for batch in options.batch:
            runs[batch]["ours"].append(measure_by_ours(options, server, batch)["output_throughput"])
        for batch, rate in by_transformers(options).items():
            runs[batch]["theirs"].append(rate)
    table = {}
    for batch, sides in runs.items():
        row = {side: round(statistics.median(rates), 2) for side, rates in sides.items()}
        row["ratio"] = round(row["ours"] / row["theirs"], 2)
        table[batch] = row
        print(f"batch={batch:<4} tokens/s: {row['ours']} / {row['theirs']} = {row['ratio']}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layout(parser)
    parser.add_argument("--python", required=True, help="of an environment with torch, transformers and accelerate")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--waves", type=int, default=3, help="of our requests, so that a measurement takes seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ours(options, Path(folder), options.tp, 1)
        with running(server):
            print(json.dumps(compare(options, server)))


if __name__ == "__main__":
    main()
