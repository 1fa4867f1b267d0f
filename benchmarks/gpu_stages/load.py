"""Streams through HTTP by our own load client: TTFT with fresh prompts, TPOT and tokens/s with cached ones."""

from typing import Any

from deployments.bench import command
from deployments.bench.figures import Figures
from deployments.bench.online import measure
from gpu_stages.stages import CONTEXT, Job


def run(job: Job) -> None:
    """Each load twice with the same prompts: then they are in the cache, and what is measured is decoding."""
    streams, input_len, output_len = ((1, 3), 40, 6) if job.is_tiny else ((1, 8, 64, 256), CONTEXT, 96)
    for count in streams:
        options = ["--concurrency", str(count), "--num-requests", str(max(2, count)), "--seed", str(count),
                   "--input-len", str(input_len), "--output-len", str(output_len), "--ignore-eos",
                   "--tokenizer", f"{job.folder}/model", "--timeout", "60"]  # fmt: skip
        for prompts in ("fresh", "cached"):
            (found,) = measure(parsed([f"http://127.0.0.1:{job.port}", *options]), None).figures
            job.record(streams=count, prompts=prompts, **shown(found))


def parsed(words: list[str]) -> Any:
    """Options of `stagemesh bench`."""
    import argparse

    parser = argparse.ArgumentParser()
    command.add_to(parser.add_subparsers())
    options = parser.parse_args(["bench", *words])
    options.goodput = {}
    return options


def shown(found: Figures) -> dict[str, Any]:
    if found.failed:
        raise RuntimeError(f"{found.failed} requests failed: {found.failures}")
    assert found.ttft_ms and found.tpot_ms and found.itl_ms
    return {
        "ttft_ms": found.ttft_ms.p50,
        "ttft_p99_ms": found.ttft_ms.p99,
        "tpot_ms": found.tpot_ms.p50,
        "itl_p99_ms": found.itl_ms.p99,
        "tokens_per_s": found.output_tokens_per_s,
    }
