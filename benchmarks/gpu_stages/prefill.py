"""Prompts in chunks of two sizes: tokens a second, and operations a second beside those of a plain matrix product."""

import math
import time

import torch

from actors.decisions.model.plan import Plan
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, StepBatch
from gpu_stages.measure import kernels, matmul_rate
from gpu_stages.random_model import GREEDY, capture, plan_of, random_runner
from gpu_stages.stages import Job


def run(job: Job) -> None:
    device = torch.device(job.device)
    shape, dtype, chunks, num_tokens = ("tiny", "float32", (16, 48), 96) if job.is_tiny else (
        "llama8b", "bfloat16", (512, 4096), 16384)  # fmt: skip
    rate = matmul_rate(device, getattr(torch, dtype))
    job.record(matmul_tflops=rate / 1e12)
    plan = plan_of(shape, dtype, max_model_len=max(chunks) + 2, max_num_seqs=8, max_num_batched_tokens=max(chunks))
    runner = random_runner(plan, device, 2 * plan.num_blocks_for_longest, shape)
    capture(runner, *[[Entry(0, 0, [0] * chunk, [], True)] for chunk in chunks])
    for chunk in chunks:
        prompts(runner, chunk, 2)  # kernels are compiled, and what cuBLAS chooses is chosen
        count = num_tokens // chunk
        began = time.perf_counter()
        prompts(runner, chunk, count)
        passed = (time.perf_counter() - began) / count
        done = operations(plan, chunk)
        job.record(
            chunk=chunk,
            ms=1000 * passed,
            tokens_per_s=chunk / passed,
            tflops=done / passed / 1e12,
            share_of_matmul=done / passed / rate,
        )
    rows, _ = kernels(device, lambda: prompts(runner, max(chunks), 1), 1)
    job.record(chunk=max(chunks), kernels=rows)


def prompts(runner: Runner, num_tokens: int, count: int) -> None:
    """Prompts of one chunk each, one after the other, two steps in flight; each closes the one before."""
    per_sequence, vocab_size = runner.plan.num_blocks_for_longest, runner.plan.spec.vocab_size
    ids = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    launched = []
    for number in range(count):
        place = number % 2
        blocks = list(range(place * per_sequence, (place + 1) * per_sequence))
        opened, closed = [NewSequence(number, GREEDY, [], num_tokens)], [number - 1] if number else []
        step = StepBatch(0, number, 0, opened, closed, [Entry(number, 0, ids, blocks, True)])
        launched.append(runner.launch(step))
        if len(launched) > 1:
            launched.pop(0).take()
    launched.pop().take()
    runner.execute(StepBatch(0, count, 0, [], [count - 1], []))


def operations(plan: Plan, num_tokens: int) -> float:
    """Of a prompt: each weight of a matrix once a token, the head for the last one; attention to half of the pairs."""
    shard, spec = plan.shards[0], plan.spec
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in shard.tensors if len(tensor.shape) == 2}
    outside = [size for name, size in sizes.items() if not name.startswith(f"{spec.layers_name}.")]
    products = 2 * (sum(sizes.values()) - sum(outside)) * num_tokens + 2 * (max(outside) if outside else 0)
    attention = sum(
        2 * one.num_heads * (one.spec.key_dim + one.spec.value_dim) * num_tokens**2 / 2 for one in shard.attentions
    )
    return products + attention
