"""Transformers' own generate and continuous batching, of the same shape, batches and contexts as our decode steps."""

import statistics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from gpu_stages.measure import seconds
from gpu_stages.random_model import config_of
from gpu_stages.stages import CONTEXT, Job


def run(job: Job) -> None:
    shape, dtype, batches, context, num_steps = (
        ("tiny", "float32", (1, 3), 40, 3) if job.is_tiny else ("llama8b", "bfloat16", (1, 8, 64), CONTEXT, 16)
    )
    config = config_of(shape, dtype)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    prompts = {
        batch: torch.randint(config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
        for batch in batches
    }
    for batch, ids in prompts.items():
        job.record(batch=batch, by="generate", ms=generate_ms(model, ids.to(job.device), num_steps))
    for batch, ids in prompts.items():
        job.record(batch=batch, by="continuous batching", ms=continuous_batching_ms(model, ids.tolist(), num_steps))


@torch.inference_mode()
def generate_ms(model: Any, ids: torch.Tensor, num_steps: int) -> float:
    """Of one step of `generate`: all steps and the prompt, less one step and the prompt; the best of two."""

    def best_s(num_new: int) -> float:
        options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return min(seconds(ids.device, lambda: model.generate(ids, attention_mask=mask, **options)) for _ in range(2))

    best_s(2)
    return 1000 * (best_s(num_steps + 1) - best_s(1)) / num_steps


def continuous_batching_ms(model: Any, prompts: list[list[int]], num_steps: int) -> float:
    """Of one step of `generate_batch`: what lies between the first and the last new id, over all prompts."""
    # On a GPU it finds out itself how much fits; on CPU that would be all of the machine's memory
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256) if model.device.type == "cpu" else None
    options = GenerationConfig(max_new_tokens=num_steps + 1, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run() -> Any:
        return model.generate_batch(prompts, options, sizes, record_timestamps=True, progress_bar=False)

    run()
    outputs = run()
    assert len(outputs) == len(prompts), "Transformers lost a request"
    gaps = []
    for output in outputs.values():
        assert output.error is None, output.error
        assert len(output.timestamps) == num_steps + 1, len(output.timestamps)
        gaps.append((output.timestamps[-1] - output.timestamps[0]) / num_steps)
    return 1000 * statistics.median(gaps)
