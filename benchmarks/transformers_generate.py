"""Transformers' own tensor parallelism, timed: `tp_plan="auto"` under torchrun, without HTTP.

    torchrun --nproc-per-node 2 benchmarks/transformers_generate.py CHECKPOINT --batch 1 8

Runs in an environment of its own, which needs torch, transformers and accelerate. With one process the model is whole.
Prints tokens/s by batch, prefill included; the last line is JSON.
"""

import argparse
import json
import os
import time

import torch
from transformers import AutoModelForCausalLM


def tokens_per_s(model, batch: int, input_len: int, output_len: int) -> float:
    ids = torch.randint(5, model.config.vocab_size, (batch, input_len), generator=torch.Generator().manual_seed(batch))
    ids = ids.to(model.device)

    def generate(count: int) -> float:
        began = time.perf_counter()
        options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 1}
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert made.shape == (batch, input_len + count)
        return time.perf_counter() - began

    with torch.no_grad():
        generate(4)
        return batch * output_len / generate(output_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    options = parser.parse_args()
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    cut = {"tp_plan": "auto"} if size > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16, **cut)
    found = {batch: tokens_per_s(model, batch, options.input_len, options.output_len) for batch in options.batch}
    if rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
