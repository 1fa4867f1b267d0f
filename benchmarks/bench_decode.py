"""How fast one GPU decodes, against what its memory allows and Transformers; one rank of a larger gang alone, too.

    python benchmarks/bench_decode.py                                    # Llama 8B on one GPU, beside Transformers
    python benchmarks/bench_decode.py --shape llama70b --shard 0 --of 8  # one shard; its all-reduces do nothing
    python benchmarks/bench_decode.py --device cpu --shape tiny          # that the script itself works

Weights are random and made on the device; prompts are random; decoding is greedy. The limit of a step is the time that
its bytes take at the bandwidth measured here: every weight but the embedding once, the keys and values of all contexts.
For a shard alone, the tokens/s of the whole gang follow from its step and an assumed time of one all-reduce. Prints a
table; with --json the last line is JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from actors.decisions.model.accelerators import ACCELERATORS  # noqa: E402
from actors.decisions.model.estimate import ALL_REDUCE_S, Estimate  # noqa: E402
from actors.decisions.model.plan import Plan, make_plan  # noqa: E402
from actors.tensors.backends.cuda.backend import CUDABackend  # noqa: E402
from actors.tensors.backends.cuda.decode import CUDADecoder  # noqa: E402
from actors.tensors.backends.cuda.decode_graph import CapturedStep  # noqa: E402
from actors.tensors.model import stage_model  # noqa: E402
from actors.tensors.model.spec_reader import read_spec  # noqa: E402
from actors.tensors.runner import Runner  # noqa: E402
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch  # noqa: E402
from cluster.collectives.interface import LoneShard  # noqa: E402
from configs.config import Config  # noqa: E402

GREEDY = SamplingParams(temperature=0)
LLAMA3 = {"num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, int | float]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
             "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 512},
    "llama8b": LLAMA3 | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                         "intermediate_size": 14336},
    "llama70b": LLAMA3 | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                          "intermediate_size": 28672},
}  # fmt: skip
NUM_WARM_UP = 5


class OneOfMany:
    """A shard whose neighbors are not there: what it exchanges comes back as it was."""

    def __init__(self, shard: int, size: int) -> None:
        self.shard, self.size = shard, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(self.size) if tensor.numel() == 1 else tensor  # a vote: the others think alike

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor] * self.size)

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Alone:
    previous = next = feedback = None

    def __init__(self, shard: int, size: int) -> None:
        self.stage = LoneShard() if size == 1 else OneOfMany(shard, size)


class RandomRunner(Runner):
    """Its weights are random numbers instead of a checkpoint's."""

    def make(self, folder: Path, substitutes: bool) -> None:
        """As `load` does, without files."""
        self.attention.choose_kernels()
        place = self.neighbors.stage, self.backend.device, self.attention
        with mock.patch.object(stage_model, "find_sources", lambda *_: None):
            self.model = stage_model.build(self.plan, self.shard.rank, folder, *place)
        for name, tensor in self.model.tensors().items():
            with torch.no_grad():
                tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02)
        if substitutes:
            self.model.prepare(self.backend)

    @property
    def bytes_read(self) -> int:
        """Of weights, in a decode step: the embedding is only looked up in."""
        embedding = f"{self.plan.spec.embedding_name}.weight"
        return sum(
            torch.Size(tensor.shape).numel() * getattr(torch, tensor.dtype).itemsize
            for tensor in self.shard.tensors
            if tensor.name != embedding or self.shard.shares_tied_weight
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--of", type=int, default=1, help="shards of the whole gang")
    parser.add_argument("--all-reduce-us", type=float, default=ALL_REDUCE_S * 1e6, help="assumed, of one all-reduce")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence before the steps measured")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--no-substitutes", action="store_true", help="all modules as the model has them")
    parser.add_argument("--no-peers", action="store_true", help="leave Transformers out")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": args.shape,
        "dtype": args.dtype,
        "shard": args.shard,
        "of": args.of,
        "context": args.context,
        "bandwidth_gb_per_s": measured_bandwidth(device) / 1e9,
    }
    config = LlamaConfig(**SHAPES[args.shape], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        result["ours"] = list(ours(args, Path(folder), device, result["bandwidth_gb_per_s"] * 1e9))
    if args.of == 1 and not args.no_peers:
        free(device)
        result["transformers"] = list(transformers(args, config, device))
        for row, peer in zip(result["ours"], result["transformers"], strict=True):
            row["times_generate"] = peer["generate_ms"] / row["ms"]
            row["times_continuous_batching"] = peer["continuous_batching_ms"] / row["ms"]
    say(result)
    if args.json:
        print(json.dumps(result))
    return result


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second: the best of copying (read and written) and of summing up (read only)."""
    num_bytes = 1 << (31 if device.type == "cuda" else 26)
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        best = max(best, 2 * num_bytes / seconds(device, lambda: target.copy_(source)))
        best = max(best, num_bytes / seconds(device, source.sum))
    return best


def seconds(device: torch.device, work: Any) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Ours


def plan_of(args: argparse.Namespace, folder: Path) -> Plan:
    longest = args.context + NUM_WARM_UP + args.steps + 2
    config = Config(
        model={"source": str(folder), "dtype": args.dtype, "max_model_len": longest},
        parallel={"tensor_parallel_size": args.of},
        cache={"block_size": args.block_size},
        scheduler={"max_num_seqs": max(args.batch), "max_num_batched_tokens": 8192},
    )
    return make_plan(config, read_spec(folder, args.dtype))


def ours(args: argparse.Namespace, folder: Path, device: torch.device, bandwidth: float) -> Iterator[dict[str, Any]]:
    plan = plan_of(args, folder)
    backend = CUDABackend(device)
    backend.set_up()
    runner = RandomRunner(plan, args.shard, Alone(args.shard, args.of), backend)
    runner.make(folder, not args.no_substitutes)
    runner.allocate_cache(max(args.batch) * plan.num_blocks_for_longest)
    runner.warm_up()
    assert isinstance(runner.decoder, CUDADecoder)
    is_captured = any(isinstance(step, CapturedStep) for step in runner.decoder.steps.values())
    num_all_reduces = Estimate(plan, next(iter(ACCELERATORS.values())), 0.8).all_reduces if args.of > 1 else 0
    for batch in args.batch:
        ms = decode_ms(runner, batch, args.context, args.steps)
        context = args.context + NUM_WARM_UP + args.steps / 2
        cache_bytes = batch * context * plan.kv_bytes_per_block(args.shard) / plan.block_size
        limit_ms = 1000 * (runner.bytes_read + cache_bytes) / bandwidth
        gang_ms = ms + num_all_reduces * args.all_reduce_us / 1000
        yield {
            "batch": batch,
            "ms": ms,
            "limit_ms": limit_ms,
            "share_of_limit": limit_ms / ms,
            "is_captured": is_captured,
            "num_all_reduces": num_all_reduces,
            "gang_ms": gang_ms,
            "tokens_per_s": 1000 * batch / gang_ms,
        }
    runner.model = runner.cache = runner.decoder = None


def decode_ms(runner: Runner, batch: int, context: int, num_steps: int) -> float:
    """Of one step, two in flight, as the engine has them; the mean over all, since waiting moves between them."""
    per_sequence, vocab_size = runner.plan.num_blocks_for_longest, runner.plan.spec.vocab_size
    for seq in range(batch):
        ids = torch.randint(vocab_size, (context,), generator=torch.Generator().manual_seed(seq)).tolist()
        opened = [NewSequence(seq, GREEDY, [], context)]
        blocks = list(range(seq * per_sequence, (seq + 1) * per_sequence))
        for first in range(0, context, 2048):
            chunk = ids[first : first + 2048]
            is_last = first + len(chunk) == context
            runner.execute(StepBatch(0, 0, 0, opened, [], [Entry(seq, first, chunk, blocks, is_last)]))
            opened, blocks = [], []
    launched: deque[Any] = deque()
    began = 0.0
    for number in range(NUM_WARM_UP + num_steps):
        if number == NUM_WARM_UP:
            while launched:
                launched.popleft().take()
            began = time.perf_counter()
        entries = [Entry(seq, context + number, [], [], True) for seq in range(batch)]
        launched.append(runner.launch(StepBatch(0, number, 0, [], [], entries)))
        if len(launched) > 1:
            launched.popleft().take()
    while launched:
        launched.popleft().take()
    passed = time.perf_counter() - began
    runner.execute(StepBatch(0, 0, 0, [], list(range(batch)), []))
    return 1000 * passed / num_steps


# Transformers


def transformers(args: argparse.Namespace, config: LlamaConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    for batch in args.batch:
        ids = torch.randint(config.vocab_size, (batch, args.context), generator=torch.Generator().manual_seed(0))
        yield {
            "batch": batch,
            "generate_ms": generate_ms(model, ids.to(device), args.steps),
            "continuous_batching_ms": continuous_batching_ms(model, ids.tolist(), args.steps),
        }


@torch.inference_mode()
def generate_ms(model: Any, ids: torch.Tensor, num_steps: int) -> float:
    """Of one step of `generate`: all steps and the prompt, less one step and the prompt; the best of three."""

    def best_s(num_new: int) -> float:
        options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}
        mask = torch.ones_like(ids)
        return min(seconds(ids.device, lambda: model.generate(ids, attention_mask=mask, **options)) for _ in range(3))

    best_s(2)
    return 1000 * (best_s(num_steps + 1) - best_s(1)) / num_steps


def continuous_batching_ms(model: Any, prompts: list[list[int]], num_steps: int) -> float:
    """Of one step of `generate_batch`: what lies between the first and the last new id, over all prompts."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

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


def say(result: dict[str, Any]) -> None:
    peers = {row["batch"]: row for row in result.get("transformers", [])}
    print(f"{result['shape']}, shard {result['shard']} of {result['of']}, {result['dtype']}, on {result['device']}")
    print(f"memory {result['bandwidth_gb_per_s']:.0f} GB/s, contexts of {result['context']} tokens")
    print("batch  ms/step  limit ms  of limit  graphs  tokens/s  generate ms  cont. batching ms")
    for row in result["ours"]:
        peer = peers.get(row["batch"])
        theirs = f"{peer['generate_ms']:11.2f}  {peer['continuous_batching_ms']:17.2f}" if peer else ""
        print(
            f"{row['batch']:5}  {row['ms']:7.2f}  {row['limit_ms']:8.2f}  {row['share_of_limit']:8.0%}  "
            f"{'yes' if row['is_captured'] else 'no':>6}  {row['tokens_per_s']:8.0f}  {theirs}"
        )
    if result["of"] > 1:
        row = result["ours"][0]
        print(f"tokens/s of the gang, were each of {row['num_all_reduces']} all-reduces to take the time assumed")


if __name__ == "__main__":
    main()
