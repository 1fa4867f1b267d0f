"""Paged attention alone, over shapes, batches and contexts: microseconds of a call in a graph, and bytes a second."""

from typing import NamedTuple

import torch

from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.attention.metadata import Chunk, LayerCache, StepLayout
from actors.tensors.backend import AttentionBackend
from actors.tensors.backends.cuda.backend import CUDABackend
from gpu_stages.measure import bandwidth, in_graph, seconds
from gpu_stages.stages import Job

SPECS = {
    "llama8b": AttentionSpec("", 32, 8, 128, 128),
    "llama70b, one of 8": AttentionSpec("", 8, 1, 128, 128),
    "gemma2": AttentionSpec("", 8, 4, 256, 256, MaskSpec(4096), 50.0),
    "gpt_oss": AttentionSpec("", 64, 8, 64, 64, MaskSpec(128), None, True),
    "deepseek, absorbed": AttentionSpec("", 128, 1, 576, 512),
}


class Rows(NamedTuple):
    """Sequences of a step, alike."""

    batch: int
    context: int  # keys of each, those of this step included
    queries: int = 1  # tokens of each in this step


GRID = {
    "llama8b": [Rows(1, 577), Rows(8, 577), Rows(64, 577), Rows(256, 577), Rows(16, 8192), Rows(1, 32768),
                Rows(1, 512, 512), Rows(1, 4096, 4096), Rows(1, 8192, 512)],
    "llama70b, one of 8": [Rows(1, 577), Rows(64, 577), Rows(16, 8192)],
    "gemma2": [Rows(64, 577), Rows(16, 8192)],
    "gpt_oss": [Rows(64, 577), Rows(16, 8192)],
    "deepseek, absorbed": [Rows(64, 577), Rows(16, 8192)],
}  # fmt: skip
TINY = {"llama70b, one of 8": [Rows(3, 40), Rows(2, 40, 8)], "gpt_oss": [Rows(2, 150)]}
CALLS = 20  # in a graph, as the layers of a step


def run(job: Job) -> None:
    device, block_size = torch.device(job.device), CUDABackend.default_block_size
    dtype, rate = torch.float32 if job.is_tiny else torch.bfloat16, bandwidth(device)
    job.record(bandwidth_gb_per_s=rate / 1e9)
    backend = CUDABackend(device)
    backend.set_up()
    for name, grid in (TINY if job.is_tiny else GRID).items():
        attention = backend.attention([SPECS[name]], dtype, block_size)
        attention.choose_kernels()
        (used,) = attention.substitutions
        for rows in grid:
            us = call_us(attention, SPECS[name], rows, dtype, block_size, device)
            num_bytes = bytes_of(SPECS[name], rows, dtype)
            job.record(
                shape=name, batch=rows.batch, context=rows.context, queries=rows.queries, us=us,
                gb_per_s=num_bytes / us / 1e3, share_of_bandwidth=num_bytes / us / 1e-6 / rate,
                reason_not=used.reason_not,
            )  # fmt: skip


@torch.inference_mode()
def call_us(
    attention: AttentionBackend,
    spec: AttentionSpec,
    rows: Rows,
    dtype: torch.dtype,
    block_size: int,
    device: torch.device,
) -> float:
    """Of one call, the best of some runs of `CALLS` in a graph."""
    per_sequence = -(-rows.context // block_size)
    num_blocks = rows.batch * per_sequence
    shape = num_blocks, block_size, spec.num_kv_heads
    keys = torch.randn(*shape, spec.key_dim, dtype=dtype, device=device)
    values = torch.randn(*shape, spec.value_dim, dtype=dtype, device=device)
    tables = torch.randperm(num_blocks).view(rows.batch, per_sequence)
    chunks = [Chunk(row, row * rows.queries, rows.context - rows.queries, rows.queries) for row in range(rows.batch)]
    metadata = attention.plan(StepLayout(chunks, tables))
    query = torch.randn(spec.num_heads, rows.batch * rows.queries, spec.key_dim, dtype=dtype, device=device)
    sinks = torch.randn(spec.num_heads, dtype=dtype, device=device) if spec.has_sinks else None
    cache, calls = LayerCache(spec, keys, values), CALLS if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(calls):
            attention.attend(cache, query, metadata, spec.key_dim**-0.5, sinks)

    replay = in_graph(device, work)
    return 1e6 * min(seconds(device, replay) for _ in range(5)) / calls


def bytes_of(spec: AttentionSpec, rows: Rows, dtype: torch.dtype) -> int:
    """Keys and values that a call must read: those in the window, once for all heads of a KV head."""
    keys = min(rows.context, (spec.mask_spec.window or rows.context) + rows.queries - 1)
    return rows.batch * keys * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * dtype.itemsize
