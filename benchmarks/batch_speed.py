"""A batch job beside the offline benchmark and beside a server under load: the same rows, config and machine, in turn.

    python benchmarks/batch_speed.py configs/demo --dtype float32 --rounds 3
    python benchmarks/batch_speed.py CHECKPOINT --rounds 3      # for instance a Llama shape of 317 M parameters

Each round starts all of them, one after the other. Prints by round, and as medians:

- `of_offline`: the time that the rows would take at the rates of `stagemesh bench --offline`, of prefill and of decode,
  each with 64 sequences, / the time that the job took from its gang being ready to its last answer;
- `of_http`: generated tokens/s of the job / those of `stagemesh bench --concurrency 64` against a server;
- `cache_hits`: of rows with 8 shared prefixes of 400 tokens, prompt tokens found in the cache / those that could be:
  all but the first of each.

The last line is JSON.
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
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from servers import ROOT, Server, running

sys.path.insert(0, str(ROOT))

from configs.files import read_config
from deployments.api.bodies import CompletionBody
from deployments.api.responses import Stamp
from deployments.batch.answerer import GangAnswerer
from deployments.batch.progress import Progress
from deployments.batch.rows import Row, Tally
from deployments.gangs import connected_to_ray

STREAMS = 64
IDS = range(3, 400)  # in every checkpoint's vocabulary
NUM_PREFIXES, PREFIX_LEN = 8, 400


class Timed(GangAnswerer):
    """Notes when its gang is ready."""

    began = 0.0

    def _send(self, *arguments: Any) -> None:
        self.began = self.began or time.perf_counter()
        super()._send(*arguments)


def job(config_file: Path, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
    """Answer prompts as a batch job → seconds from the gang being ready, and what the gangs have counted."""
    config = read_config(config_file)

    def rows() -> Iterator[Row]:
        for number, ids in enumerate(prompts):
            fields = {"prompt": ids, "max_tokens": output_len, "ignore_eos": True, "temperature": 0.0, "seed": number}
            body = CompletionBody.model_validate({"model": config.served_name, **fields})
            yield Row(number, str(number), body, Stamp(f"{number:032x}", 0), 8 * len(ids))

    progress = Progress(Tally(len(prompts)), StringIO())
    answerer = Timed(config, datetime(2026, 1, 1, tzinfo=UTC), progress, int)
    with connected_to_ray("batch"):
        for outcome in answerer.run(rows()):
            if outcome.status != 200:
                raise SystemExit(outcome.body.decode())
            ended = time.perf_counter()
    return {**progress.report(), "seconds": ended - answerer.began}


def command(*arguments: str) -> dict[str, Any]:
    """What `stagemesh bench` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "bench", *arguments, "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout))


def random_prompts(options: argparse.Namespace, seed: int) -> list[list[int]]:
    world = random.Random(seed)
    return [world.choices(IDS, k=options.input_len) for _ in range(options.rows)]


def of_offline(config: Path, options: argparse.Namespace, batch_s: float) -> float:
    lengths = ["--input-len", str(options.input_len), "--output-len", str(options.output_len)]
    (layout,) = command(str(config), "--offline", "--batch", str(STREAMS), *lengths)["layouts"]
    (speed,) = layout["speeds"]
    prompts, answers = options.rows * options.input_len, options.rows * options.output_len
    return (prompts / speed["prefill_tokens_per_s"] + answers / speed["decode_tokens_per_s"]) / batch_s


def http_tokens_per_s(config: Path, options: argparse.Namespace) -> float:
    lengths = ["--input-len", str(options.input_len), "--output-len", str(options.output_len), "--ignore-eos"]
    serve = [sys.executable, "-m", "deployments.serve.command", str(config)]
    server = Server("ours", f"http://127.0.0.1:{options.port}", "/ready", serve, {"RAY_SERVE_ENABLE_HA_PROXY": "1"})
    with running(server):
        clients = ["--concurrency", str(STREAMS), "--num-requests", str(options.rows)]
        (figures,) = command(server.url, "--tokenizer", str(options.checkpoint), *clients, *lengths)["figures"]
    if figures["failed"]:
        raise SystemExit(figures["failures"])
    return float(figures["output_tokens_per_s"])


def cache_hits(config: Path, options: argparse.Namespace, seed: int) -> float:
    world = random.Random(seed)
    shared = [world.choices(IDS, k=PREFIX_LEN) for _ in range(NUM_PREFIXES)]
    prompts = [shared[number % NUM_PREFIXES] + world.choices(IDS, k=32) for number in range(options.rows)]
    return job(config, prompts, 16)["cached_tokens"] / ((options.rows - NUM_PREFIXES) * PREFIX_LEN)


def write_config(options: argparse.Namespace, folder: Path) -> Path:
    arguments = {
        "model": {"source": str(options.checkpoint), "name": "compared", "dtype": options.dtype},
        "parallel": {"tensor_parallel_size": options.tp},
        "device": "cpu",
        "cache": {"num_blocks": 1024},
        "placement": {"cpus_per_rank": 0.5, "cpus_per_replica": 0.5},
        "batch": {"gangs": 1},
    }
    application = {"name": "compared", "route_prefix": "/", "import_path": "deployments.app:build_app"}
    http = {"host": "127.0.0.1", "port": options.port}
    config = folder / "compared.yaml"
    config.write_text(
        yaml.safe_dump(
            {"proxy_location": "HeadOnly", "http_options": http, "applications": [{**application, "args": arguments}]}
        )
    )
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=lambda text: Path(text).resolve())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--only", choices=["offline", "http", "cache"])
    options = parser.parse_args()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        config = write_config(options, Path(scratch))
        for number in range(options.rounds):
            found: dict[str, float] = {}
            if options.only != "cache":
                batch_s = job(config, random_prompts(options, number), options.output_len)["seconds"]
                found["tokens_per_s"] = options.rows * options.output_len / batch_s
            if options.only in (None, "offline"):
                found["of_offline"] = of_offline(config, options, batch_s)
            if options.only in (None, "http"):
                found["of_http"] = found["tokens_per_s"] / http_tokens_per_s(config, options)
            if options.only in (None, "cache"):
                found["cache_hits"] = cache_hits(config, options, number)
            rounds.append(found)
            print(f"round {number + 1}: " + json.dumps({k: round(v, 3) for k, v in found.items()}), flush=True)
    print(json.dumps({name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
