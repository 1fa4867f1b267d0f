"""This checkout beside another one, of an earlier commit: tokens/s of both, in turn, in one run.

    git worktree add ../before COMMIT && make -C ../before venv
    python benchmarks/before_after.py CHECKPOINT --before ../before --rounds 8
    python benchmarks/before_after.py CHECKPOINT --before ../before --rounds 8 --only ready

Each round starts gangs of both, first one and then the other, by `stagemesh bench --offline` (no HTTP). Prints for each
figure the median of the ratios after / before, their 90 % interval (bootstrap of the median), and the lowest; `ready`
is the time from `make serve` of the demo to its /ready. The last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from servers import ROOT, Server

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
LAYOUTS = ["2x1", "1x2"]
BATCHES = [1, 8, 32]
LONG_PROMPT = 1500  # tokens
ATTEMPTS = 3


def offline(folder: Path, config: Path, *options: str) -> list[dict]:
    """The layouts' figures of one run of a checkout's own command."""
    command = [
        ".venv/bin/python",
        "-m",
        "deployments.cli",
        "bench",
        str(config),
        "--offline",
        "--rounds",
        "1",
        "--json",
    ]
    for _ in range(ATTEMPTS):  # Ray may end a process that asks it while it shuts down
        done = subprocess.run(
            [*command, "--layouts", *LAYOUTS, *options],
            cwd=folder, capture_output=True, text=True, timeout=900, env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        if done.returncode == 0:
            return json.loads(done.stdout)["layouts"]
    raise SystemExit(f"{folder}: {done.stderr[-3000:]}")


def tokens(folder: Path, config: Path) -> dict[str, float]:
    """Tokens/s of decoding at each number of streams, and of one long prompt, by layout."""
    found = {}
    for layout, one in zip(LAYOUTS, offline(folder, config, "--batch", *map(str, BATCHES)), strict=True):
        for speed in one["speeds"]:
            found[f"{layout}, {speed['batch']} streams"] = speed["decode_tokens_per_s"]
    long = ["--batch", "1", "--input-len", str(LONG_PROMPT), "--output-len", "4"]
    for layout, one in zip(LAYOUTS, offline(folder, config, *long), strict=True):
        found[f"{layout}, prompt of {LONG_PROMPT}"] = one["speeds"][0]["prefill_tokens_per_s"]
    return found


def ready(folder: Path) -> dict[str, float]:
    """How often a second the demo could become ready: a rate, so that more is better here too."""
    began = time.monotonic()
    server = Server("demo", "http://127.0.0.1:8000", "/ready", ["make", "serve"], {}, folder)
    try:
        server.wait(poll_s=0.1)
        return {"ready": 1 / (time.monotonic() - began)}
    finally:
        server.close()


def interval(ratios: list[float]) -> tuple[float, float]:
    """90 % of the medians of resamples lie in it."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[200], medians[3799]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder, for instance of a Llama shape of 317 M parameters")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, with its .venv")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", choices=["tokens", "ready"])
    options = parser.parse_args()
    arguments = {
        "model": {"source": str(options.checkpoint.resolve()), "dtype": "bfloat16", "max_model_len": 2048},
        "device": "cpu",
        "cache": {"num_blocks": 1024},
        "placement": {"cpus_per_rank": 0.5, "cpus_per_replica": 0.5},
    }
    application = {"name": "x", "route_prefix": "/", "import_path": "deployments.app:build_app", "args": arguments}
    folders = {"before": options.before.resolve(), "after": ROOT}
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "compared.yaml"
        config.write_text(yaml.safe_dump({"applications": [application]}))
        for number in range(options.rounds):
            for name in sorted(folders, reverse=number % 2 == 0):  # who is first changes from round to round
                run: dict[str, float] = {}
                if options.only != "ready":
                    run |= tokens(folders[name], config)
                if options.only != "tokens":
                    run |= ready(folders[name])
                runs[name].append(run)
                print(
                    f"round {number + 1}, {name}: " + json.dumps({k: round(v, 4) for k, v in run.items()}), flush=True
                )
    report(runs)


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    table = {}
    for figure in runs["after"][0]:
        pairs = [(a[figure], b[figure]) for a, b in zip(runs["after"], runs["before"], strict=True)]
        ratios = [after / before for after, before in pairs]
        low, high = interval(ratios)
        table[figure] = {
            "after": round(statistics.median(after for after, _ in pairs), 4),
            "before": round(statistics.median(before for _, before in pairs), 4),
            "ratio": round(statistics.median(ratios), 3),
            "interval": [round(low, 3), round(high, 3)],
            "lowest": round(min(ratios), 3),
        }
        row = table[figure]
        print(f"{figure:24} {row['after']:9} / {row['before']:9} = {row['ratio']:.3f}  [{low:.3f}, {high:.3f}]")
    print(json.dumps(table))


if __name__ == "__main__":
    sys.exit(main())
