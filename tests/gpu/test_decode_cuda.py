"""Steps on a GPU: graphs, the paged kernel and fused kernels bring what plain steps bring, and nothing waits."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.attention import reference
from actors.tensors.attention.metadata import LayerCache, PagedRows
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda.attention import CUDAAttention
from actors.tensors.backends.cuda.attention_trial import try_kernel
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.cuda.graph_runner import CUDAGraphRunner
from actors.tensors.backends.cuda.paged_attention import PagedAttention
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch
from cluster.collectives.interface import LoneShard, PresentGroup
from cluster.collectives.process_group import NcclGroup, TorchStage
from cluster.collectives.rendezvous import host_store, join_store
from configs.config import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 320,
    "vocab_size": 505,
    "head_dim": 64,
    "initializer_range": 0.1,
    "max_position_embeddings": 2048,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=300),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=300),
}
BLOCK_SIZE = 256
NUM_SEQS = 5


class Alone:
    previous = next = feedback = None

    def __init__(self, stage=None) -> None:
        self.stage = stage or LoneShard()


def make(family: str, folder: Path, device: str, dtype: str, stage=None, captures: bool = True) -> Runner:
    config = CONFIGS[family]()
    torch.manual_seed(0)
    if not (folder / "config.json").exists():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    backend = (CUDABackend if device == "cuda" else CPUBackend)(torch.device(device))
    backend.set_up()
    runner = Runner(plan_of(folder, dtype), 0, Alone(stage), backend)
    runner.load(folder)
    runner.allocate_cache(4 * NUM_SEQS)
    runner.warm_up()
    if captures:
        for shape in reversed(runner.shapes):
            assert runner.capture(shape) is None
    return runner


def plan_of(folder: Path, dtype: str) -> Plan:
    config = Config(
        model={"source": str(folder), "dtype": dtype, "max_model_len": 700},
        cache={"block_size": BLOCK_SIZE},
        scheduler={"max_num_seqs": NUM_SEQS},
    )
    return make_plan(config, read_spec(folder, dtype))


def is_captured(runner: Runner) -> bool:
    assert isinstance(runner.graphs, CUDAGraphRunner)
    return set(runner.graphs.captured) == set(runner.graphs.buckets.shapes)


def steps(num_decode: int, feed: bool, params: SamplingParams | None = None) -> list[StepBatch]:
    """Prompts around the window and the blocks' ends, then decode; `feed`: with fixed ids, else "your last".

    Four prompts come in one large step; chunks of the last one go beside decode rows. All sequences are sampled as
    `params` say, or in three ways.
    """
    numbers = random.Random(0)
    lengths = [3, 255, 256, 290, 520]
    sampling = [SamplingParams(temperature=0), SamplingParams(0.9, seed=3), SamplingParams(0.8, seed=5, top_k=20)]
    opened = [NewSequence(seq, params or sampling[seq % 3], [], length) for seq, length in enumerate(lengths)]
    prompts = [[numbers.randrange(505) for _ in range(length)] for length in lengths]
    blocks = [list(range(4 * seq, 4 * seq + 3)) for seq in range(NUM_SEQS)]
    asks = params is not None and params.prompt_logprobs is not None
    entries = [Entry(seq, 0, prompts[seq], blocks[seq], True, asks) for seq in range(NUM_SEQS - 1)]
    found, last, ends = [StepBatch(0, 0, 0, opened[:-1], [], entries)], NUM_SEQS - 1, [0, 10, 70, 300, 520]

    def rows(seqs: list[int]) -> list[Entry]:
        made = [Entry(seq, lengths[seq], [numbers.randrange(505)] if feed else [], [], True) for seq in seqs]
        for seq in seqs:
            lengths[seq] += 1
        return made

    for start, end in itertools.pairwise(ends):
        chunk = Entry(last, start, prompts[last][start:end], [] if start else blocks[last], end == ends[-1])
        found.append(StepBatch(0, len(found), 0, [] if start else opened[-1:], [], [*rows([0, 1, 3]), chunk]))
    for number in range(num_decode):
        taking_part = [seq for seq in range(NUM_SEQS) if feed or number % 4 or seq < 3]  # three rows are padded to four
        found.append(StepBatch(0, len(found), 0, [], [], rows(taking_part)))
    return found


def ids_of(runner: Runner, batches: list[StepBatch]) -> list[list[list[int]]]:
    """Two steps in flight, as the engine has them."""
    launched, ids = [], []
    for batch in batches:
        launched.append(runner.launch(batch))
        if len(launched) > 1:
            ids.append(launched.pop(0).take().token_ids)
    return ids + [step.take().token_ids for step in launched]


@pytest.mark.parametrize("family", CONFIGS)
def test_float32_graphs_bring_the_ids_of_the_cpu(family: str, tmp_path: Path) -> None:
    expected = ids_of(make(family, tmp_path, "cpu", "float32"), steps(12, feed=False))
    runner = make(family, tmp_path, "cuda", "float32")
    assert is_captured(runner)
    assert ids_of(runner, steps(12, feed=False)) == expected


def logits_of(runner: Runner, batches: list[StepBatch]) -> torch.Tensor:
    rows = []
    sample = runner.sampler.sample

    def record(logits, batch):
        rows.append(logits.float().cpu())
        return sample(logits, batch)

    runner.sampler.sample = record
    ids_of(runner, batches)
    return torch.cat(rows)


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_graphs_with_kernels_are_close_to_float32(family: str, tmp_path: Path) -> None:
    expected = logits_of(make(family, tmp_path, "cpu", "float32"), steps(12, feed=True))
    runner = make(family, tmp_path, "cuda", "bfloat16")
    assert isinstance(runner.attention, CUDAAttention)
    counts = {one.what: one.count for one in runner.substitutions}
    parts = "paged_attention", "attention_block", "gated_mlp", "decoder_layer"
    assert [counts[part] for part in parts] == [3] * 4, runner.substitutions
    assert counts["vocabulary_search"] == 1, runner.substitutions
    assert is_captured(runner)
    found = logits_of(runner, steps(12, feed=True))
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_replay_is_the_step_that_was_captured(family: str, tmp_path: Path) -> None:
    captured = make(family, tmp_path, "cuda", "bfloat16")
    plain = make(family, tmp_path, "cuda", "bfloat16", captures=False)
    assert ids_of(captured, steps(30, feed=False)) == ids_of(plain, steps(30, feed=False))


def test_padding_touches_no_block_of_a_sequence(tmp_path: Path) -> None:
    runner = make("llama", tmp_path, "cuda", "bfloat16")
    batches = steps(6, feed=False)
    ids_of(runner, batches[:2])
    before = [tensor.clone() for tensor in runner.cache.tensors]
    runner.execute(StepBatch(0, 9, 0, [], [], [Entry(0, 4, [], [], True)]))
    three = [Entry(seq, start, [7], [], True) for seq, start in ((0, 5), (1, 256), (2, 257))]
    runner.execute(StepBatch(0, 10, 0, [], [], three))
    for was, now in zip(before, runner.cache.tensors, strict=True):
        changed = (was != now).flatten(2).any(2).nonzero().tolist()
        slots = {(block, slot) for block, slot in changed if block != 4 * NUM_SEQS}
        assert slots <= {(0, 4), (0, 5), (5, 0), (9, 1)}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(0.9, seed=1, top_p=0.9),
        SamplingParams(0.9, seed=2, top_k=300, top_p=0.9),
        SamplingParams(0.9, seed=3, top_k=20, min_p=0.01),
        SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={3: 1.0}),
        SamplingParams(temperature=0, logprobs=3, prompt_logprobs=1),
    ],
)
@pytest.mark.parametrize("captures", [True, False])
def test_no_step_waits(params: SamplingParams, captures: bool, tmp_path: Path) -> None:
    """Prompts, chunks beside decode rows, and decode."""
    runner = make("llama", tmp_path, "cuda", "bfloat16", captures=captures)
    ids_of(runner, steps(5, False, params))  # kernels are compiled
    runner.launch(StepBatch(0, 99, 0, [], list(range(NUM_SEQS)), []))
    batches = steps(5, False, params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [runner.launch(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(step.take().token_ids for step in launched)


def test_a_step_is_launched_long_before_it_ends(tmp_path: Path) -> None:
    runner = make("llama", tmp_path, "cuda", "bfloat16")
    batches = steps(3, feed=False)
    ids_of(runner, batches[:2])
    torch.cuda._sleep(2_000_000_000)  # about a second of the device's time
    launched = runner.launch(batches[2])
    assert not launched.is_ready()
    assert len(launched.take().token_ids) == sum(entry.sample for entry in batches[2].entries)


def test_graphs_hold_nccl_s_all_reduce(tmp_path: Path) -> None:
    """A group of one shard goes the whole way through NCCL."""
    device = torch.device("cuda", 0)
    server, port = host_store("127.0.0.1")
    store = join_store("127.0.0.1", port, 1, 30.0)
    stage = TorchStage(NcclGroup("stage0", store, [0], 0, device, 30.0))
    stage.all_reduce(torch.ones(1, device=device))
    runner = make("llama", tmp_path, "cuda", "float32", stage)
    assert isinstance(runner.model.group, PresentGroup) and is_captured(runner)
    expected = ids_of(make("llama", tmp_path, "cpu", "float32"), steps(8, feed=False))
    assert ids_of(runner, steps(8, feed=False)) == expected
    runner.graphs.release()
    stage.close()
    del server


SPEC = AttentionSpec("", 8, 2, 64, 64)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        dataclasses.replace(SPEC, mask_spec=MaskSpec(window=100)),
        dataclasses.replace(SPEC, mask_spec=MaskSpec(window=1)),
        dataclasses.replace(SPEC, mask_spec=MaskSpec(chunk=64)),
        dataclasses.replace(SPEC, softcap=50.0),
        dataclasses.replace(SPEC, has_sinks=True),
        dataclasses.replace(SPEC, num_kv_heads=8),
        dataclasses.replace(SPEC, key_dim=128, value_dim=128, num_heads=64, num_kv_heads=8),
        dataclasses.replace(SPEC, key_dim=256, value_dim=256),
        dataclasses.replace(SPEC, key_dim=80, value_dim=80),
        dataclasses.replace(SPEC, key_dim=192, value_dim=128),
        dataclasses.replace(SPEC, key_dim=576, value_dim=512, num_heads=16, num_kv_heads=1),
    ],
)
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_agree_with_attention_written_out(spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> None:
    found = try_kernel(spec, dtype, block_size, torch.device("cuda"))
    assert isinstance(found, PagedAttention), found


def test_the_gather_runs_on_cuda() -> None:
    spec = dataclasses.replace(SPEC, mask_spec=MaskSpec(window=100))
    keys = torch.randn(4, 16, 2, 64, device="cuda")
    rows = PagedRows.decode(
        torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device="cuda"),
        torch.tensor([20, 32], dtype=torch.int32, device="cuda"),
        16,
    )
    query = torch.randn(2, 8, 64, device="cuda")
    found = reference.attend_whole_tables(LayerCache(spec, keys, keys), query, rows, 0.125)
    on_cpu = PagedRows.decode(rows.tables_SN.cpu(), rows.lengths_S.cpu(), 16)
    cache = LayerCache(spec, keys.cpu(), keys.cpu())
    expected = reference.attend_whole_tables(cache, query.cpu(), on_cpu, 0.125)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
