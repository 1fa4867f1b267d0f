"""The floor of decode at one sequence on CPU: how fast cores read packed weights, and what a checkpoint makes of it.

    python benchmarks/packed_rate.py CHECKPOINT --tp 2

As many processes as there are shards read at once, one thread each, weights far larger than their caches, packed as the
ranks pack them. Prints GB/s of each, and the ms that a shard's weights take to be read once (all but the embedding, of
which a token reads one row); the last line is JSON.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch

from actors.decisions.model.plan import make_plan
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.model.spec_reader import read_spec
from configs.config import Config

SHAPE = (4096, 1024)
NUM_WEIGHTS = 40  # 336 MB
NUM_PASSES = 200  # some seconds


def read(start: "multiprocessing.synchronize.Barrier", rates: "multiprocessing.Queue[float]") -> None:
    """One process: its GB/s, while the others read too."""
    backend = CPUBackend(torch.device("cpu"))
    backend.set_up()
    methods = [backend.linear_method([torch.randn(SHAPE).bfloat16()]) for _ in range(NUM_WEIGHTS)]
    num_bytes, x, seen = NUM_WEIGHTS * SHAPE[0] * SHAPE[1] * 2, torch.randn(1, SHAPE[1]).bfloat16(), []
    with torch.inference_mode():
        methods[0].multiply(x, None)  # may be compiled now
        start.wait(60)
        for _ in range(NUM_PASSES):
            began = time.perf_counter()
            for method in methods:
                method.multiply(x, None)
            seen.append(num_bytes / (time.perf_counter() - began) / 1e9)
    rates.put(statistics.median(seen))


def packed_gb_per_s(num_processes: int) -> float:
    """Of each of so many processes, on average."""
    context = multiprocessing.get_context("spawn")
    start, rates = context.Barrier(num_processes), context.Queue()
    processes = [context.Process(target=read, args=(start, rates)) for _ in range(num_processes)]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return total / num_processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tp", type=int, default=2)
    options = parser.parse_args()
    asked = {"model": {"source": str(options.checkpoint)}, "parallel": {"tensor_parallel_size": options.tp}}
    plan = make_plan(Config.model_validate(asked), read_spec(options.checkpoint, "bfloat16"))
    embedding = f"{plan.spec.embedding_name}.weight"
    shard = max(
        sum(tensor.num_bytes for tensor in part.tensors if tensor.name != embedding or plan.spec.tied_head)
        for part in plan.shards
    )
    rate = packed_gb_per_s(options.tp)
    floor_ms = shard / rate / 1e6
    print(
        f"packed bfloat16, {options.tp} at once: {rate:.1f} GB/s each; {shard / 1e6:.0f} MB a shard: {floor_ms:.1f} ms"
    )
    print(json.dumps({"gb_per_s": round(rate, 2), "shard_bytes": shard, "floor_ms": round(floor_ms, 2)}))


if __name__ == "__main__":
    main()
