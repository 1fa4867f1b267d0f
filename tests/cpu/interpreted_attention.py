"""What test_triton.py runs in a process whose kernels Triton interprets: numbers, bits, the ids of models.

Collected only where it is named: kernels are interpreted or compiled from the moment that they are decorated. Sizes are
small, and lengths lie around the ends of blocks and splits.
"""

import itertools
import random
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.attention.metadata import LayerCache, PagedRows
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda import attention as cuda_attention
from actors.tensors.backends.cuda import layers as cuda_layers
from actors.tensors.backends.cuda.attention_trial import try_kernel, why_not
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.tensors.backends.cuda.paged_attention import PagedAttention
from actors.tensors.backends.trial import Deviation
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.runner import Runner
from actors.words.messages import Substitution
from configs.config import Config

pytestmark = pytest.mark.timeout(900)  # an interpreter is slow, and slower beside others
CPU = torch.device("cpu")
NAN = float("nan")
worlds = runpy.run_path(str(Path(__file__).with_name("test_graph_runner.py")))


class Case(NamedTuple):
    heads: tuple[int, int] = (4, 2)  # and KV heads
    dims: tuple[int, int] = (32, 32)  # of keys and values
    mask: MaskSpec = MaskSpec()
    softcap: float | None = None
    has_sinks: bool = False
    block_size: int = 16
    counts: tuple[int, ...] = (1, 1, 1)  # tokens of each sequence in the step
    lengths: tuple[int, ...] = (1, 17, 515)  # keys of each
    values_in_keys: bool = False  # values are the first columns of the keys
    dtype: torch.dtype = torch.float32


class Step(NamedTuple):
    """One step over a cache in which everything is NaN but keys that tokens of the step see."""

    cache: LayerCache
    query_ThD: torch.Tensor
    rows: PagedRows
    sinks: torch.Tensor | None


def step_of(case: Case, seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    (num_heads, num_kv_heads), (key_dim, value_dim), size = case.heads, case.dims, case.block_size
    spec = AttentionSpec("", num_heads, num_kv_heads, key_dim, value_dim, case.mask, case.softcap, case.has_sinks)
    num_blocks = [-(-length // size) for length in case.lengths]
    tables_SN = torch.full((len(case.lengths), max(num_blocks)), -(10**6), dtype=torch.int32)  # not to be followed
    blocks = iter(torch.randperm(sum(num_blocks) + 3, generator=generator).tolist())
    keys = torch.full((sum(num_blocks) + 3, size, num_kv_heads, key_dim), NAN, dtype=case.dtype)
    values = keys[..., :value_dim]
    if not case.values_in_keys:
        values = torch.full((*keys.shape[:3], value_dim), NAN, dtype=case.dtype)
    for seq, length in enumerate(case.lengths):
        for n in range(num_blocks[seq]):
            tables_SN[seq, n] = block = next(blocks)
            keys[block, : length - n * size] = normal(min(size, length - n * size), num_kv_heads, key_dim)
            if not case.values_in_keys:
                values[block, : length - n * size] = normal(min(size, length - n * size), num_kv_heads, value_dim)
        unseen = torch.arange(case.mask.first_key(length - case.counts[seq]))
        keys[tables_SN[seq, unseen // size].long(), unseen % size] = NAN
        values[tables_SN[seq, unseen // size].long(), unseen % size] = NAN
    offsets = [0, *itertools.accumulate(case.counts)]
    rows = PagedRows(
        tables_SN,
        torch.tensor(case.lengths, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int32),
        max_tokens=offsets[-1],
        max_single=case.counts.count(1),
        max_queries=max(case.counts),
        max_keys=max(case.lengths),
    )
    sinks = normal(num_heads) if case.has_sinks else None
    return Step(LayerCache(spec, keys, values), normal(offsets[-1], num_heads, key_dim), rows, sinks)


def kernel_of(step: Step) -> PagedAttention:
    return PagedAttention(step.cache.spec, step.query_ThD.dtype, step.cache.keys_NbHD.shape[1], CPU)


def attend(step: Step, kernel: PagedAttention | None = None) -> torch.Tensor:
    kernel, scaling = kernel or kernel_of(step), 3 * step.query_ThD.shape[2] ** -0.5
    return kernel.attend(
        step.cache, step.query_ThD.transpose(0, 1), step.rows, kernel.plan(step.rows), scaling, step.sinks
    )


def written_out(step: Step) -> torch.Tensor:
    """One token after the other, in float64."""
    spec, rows, out = step.cache.spec, step.rows, []
    for seq, length in enumerate(rows.lengths_S.tolist()):
        blocks = rows.tables_SN[seq, : -(-length // step.cache.keys_NbHD.shape[1])].long()
        keys, values = (cached[blocks].flatten(0, 1)[:length].double() for cached in step.cache[1:])
        first, end = rows.first_tokens_O[seq : seq + 2].tolist()
        for token in range(first, end):
            position = length - end + token
            seen = slice(spec.mask_spec.first_key(position), position + 1)
            own_keys, own_values = (
                x[seen].repeat_interleave(spec.num_heads // spec.num_kv_heads, 1) for x in (keys, values)
            )
            logits = torch.einsum("hd,khd->hk", step.query_ThD[token].double(), own_keys) * 3 * spec.key_dim**-0.5
            if spec.softcap is not None:
                logits = spec.softcap * torch.tanh(logits / spec.softcap)
            if step.sinks is not None:
                logits = torch.cat([logits, step.sinks.double()[:, None]], 1)
            weights = logits.softmax(1)[:, : position + 1 - seen.start]
            out.append(torch.einsum("hk,khd->hd", weights, own_values))
    return torch.stack(out)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that is allocated for kernels lies between elements that must stay as they are."""
    new_empty, made = torch.Tensor.new_empty, []

    def fenced(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        whole = torch.full((shape.numel() + 128,), -77, dtype=options.get("dtype", self.dtype))
        made.append(whole)
        return whole[64:-64].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    yield
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    assert made and all((whole[:64] == -77).all() and (whole[-64:] == -77).all() for whole in made)


# Every value of each axis once or more, and what may disturb each other together
CASES = [
    Case(),
    Case(heads=(3, 3), dims=(20, 20), counts=(1, 2, 7), lengths=(256, 258, 7)),
    Case(heads=(6, 2), dims=(80, 80), mask=MaskSpec(window=1), block_size=4, counts=(1, 5, 1), lengths=(257, 5, 1)),
    Case(heads=(20, 1), dims=(64, 64), mask=MaskSpec(300), block_size=24, counts=(1, 9, 1), lengths=(570, 310, 24)),
    Case(heads=(4, 1), dims=(24, 40), mask=MaskSpec(chunk=64), counts=(1, 70, 1), lengths=(65, 130, 64)),
    Case(dims=(192, 128), softcap=5.0, counts=(1, 3), lengths=(48, 35)),
    Case(dims=(16, 16), softcap=0.05, has_sinks=True, mask=MaskSpec(window=16), counts=(1, 17), lengths=(530, 33)),
    Case(heads=(8, 2), has_sinks=True, block_size=100, counts=(1, 40), lengths=(300, 40)),
    Case(heads=(4, 1), dims=(576, 512), values_in_keys=True, counts=(1, 2), lengths=(33, 18)),
    Case(heads=(40, 1), dims=(48, 96), mask=MaskSpec(50, 128), counts=(1, 1, 3), lengths=(129, 128, 300)),
    Case(dtype=torch.float16, counts=(1, 33), lengths=(280, 280)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("guarded")
def test_it_is_attention_written_out(case: Case) -> None:
    step = step_of(case)
    before = [cached.clone() for cached in step.cache[1:]]
    tolerance = 2e-5 if case.dtype == torch.float32 else 3e-3
    torch.testing.assert_close(attend(step).double(), written_out(step), rtol=tolerance, atol=tolerance)
    for was, now in zip(before, step.cache[1:], strict=True):
        assert torch.equal(was.nan_to_num(7.0), now.nan_to_num(7.0)), "nothing is written to the cache"


def all_cases() -> Iterator[Case]:
    """The whole grid, thinned by drawing lengths and counts at random."""
    numbers = random.Random(0)
    heads = [(1, 1), (4, 4), (4, 2), (6, 2), (7, 1), (32, 4), (71, 1)]
    dims = [(16, 16), (20, 20), (64, 64), (80, 80), (96, 128), (128, 128), (192, 128), (256, 256), (576, 512)]
    masks = [MaskSpec(), MaskSpec(1), MaskSpec(17), MaskSpec(256), MaskSpec(None, 64), MaskSpec(300, 512)]
    ends = [(None, False), (5.0, False), (None, True), (30.0, True)]
    for number, (head, dim, mask, (softcap, has_sinks)) in enumerate(itertools.product(heads, dims, masks, ends)):
        if number % 4:  # a quarter of them, another one of each axis each time
            continue
        block_size = numbers.choice([16, 17, 24, 32, 64, 256])
        near = [1, block_size - 1, block_size, block_size + 1, 255, 256, 257, 513, 600]
        lengths = tuple(numbers.choice(near) for _ in range(3))
        counts = tuple(numbers.choice([1, 1, min(length, 2), min(length, 37)]) for length in lengths)
        dtype = numbers.choice([torch.float32, torch.float32, torch.float16])
        yield Case(head, dim, mask, softcap, has_sinks, block_size, counts, lengths, dim[0] > dim[1], dtype)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("guarded")
def test_all_shapes() -> None:
    for case in all_cases():
        step = step_of(case)
        tolerance = 5e-5 if case.dtype == torch.float32 else 5e-3
        torch.testing.assert_close(
            attend(step).double(),
            written_out(step),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, case=case: f"{case}: {m}",
        )


def part_of(step: Step, seqs: list[int], others: Step | None = None) -> Step:
    """Some of a step's sequences, alone or behind those of another step, in other blocks of another cache."""
    rows, (spec, keys, values) = step.rows, step.cache
    parts = [(step, seq) for seq in seqs]
    if others is not None:
        parts = [(others, seq) for seq in range(len(others.rows.lengths_S))] + parts
    size, num_blocks = keys.shape[1], sum(-(-int(one.rows.lengths_S[seq]) // keys.shape[1]) for one, seq in parts)
    new_keys, new_values = (cached.new_full((num_blocks + 1, *cached.shape[1:]), NAN) for cached in (keys, values))
    tables_SN = torch.full((len(parts), num_blocks), -(10**6), dtype=torch.int32)
    free = iter(reversed(range(num_blocks)))
    for row, (one, seq) in enumerate(parts):
        for n in range(-(-int(one.rows.lengths_S[seq]) // size)):
            tables_SN[row, n] = block = next(free)
            old = one.rows.tables_SN[seq, n]
            new_keys[block], new_values[block] = one.cache.keys_NbHD[old], one.cache.values_NbHD[old]
    offsets = [one.rows.first_tokens_O[seq : seq + 2].tolist() for one, seq in parts]
    counts = [end - first for first, end in offsets]
    return Step(
        LayerCache(spec, new_keys, new_values),
        torch.cat([one.query_ThD[first:end] for (one, _), (first, end) in zip(parts, offsets, strict=True)]),
        PagedRows(
            tables_SN,
            torch.stack([one.rows.lengths_S[seq] for one, seq in parts]),
            torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            max_tokens=sum(counts) + 9,  # bounds, as a graph has them
            max_single=counts.count(1) + 3,
            max_queries=max(*counts, 2),
            max_keys=int(rows.lengths_S.max()) + 2000,
        ),
        step.sinks,
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(heads=(2, 1), counts=(1, 5, 70), lengths=(515, 130, 70)),
        Case(heads=(2, 1), mask=MaskSpec(270), softcap=5.0, has_sinks=True, counts=(1, 2), lengths=(530, 275)),
    ],
)
def test_bits_follow_from_the_sequence_alone(case: Case) -> None:
    """Alone, behind others, in other blocks as after a preemption, and whatever number of programs share the work."""
    step, others = step_of(case), step_of(case, seed=1)
    together = attend(step)
    for seq in range(len(case.counts)):
        first, end = step.rows.first_tokens_O[seq : seq + 2].tolist()
        alone, behind = attend(part_of(step, [seq])), attend(part_of(step, [seq], others))
        assert torch.equal(alone, together[first:end]) and torch.equal(behind[-(end - first) :], together[first:end])
    kernel = kernel_of(step)
    kernel._num_programs = 50
    assert torch.equal(attend(step, kernel), together)


def test_bits_do_not_follow_from_how_a_prompt_is_cut() -> None:
    """The last 30 tokens of a prompt in one chunk, or in two."""
    case = Case(heads=(2, 1), mask=MaskSpec(window=100), counts=(30,), lengths=(290,))
    whole = step_of(case)
    rows, pieces = whole.rows, []
    for begin, end in ((0, 11), (11, 30)):
        cut = PagedRows(
            rows.tables_SN,
            torch.tensor([290 - 30 + end], dtype=torch.int32),
            torch.tensor([0, end - begin], dtype=torch.int32),
            end - begin, 0, end - begin, 290,
        )  # fmt: skip
        pieces.append(attend(Step(whole.cache, whole.query_ThD[begin:end], cut, None)))
    assert torch.equal(torch.cat(pieces), attend(whole))


SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 53,
    "sliding_window": 5,
    "attn_logit_softcapping": 3.0,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window in one layer, none in the other, and a soft cap in both."""
    folder = tmp_path_factory.mktemp("gemma2")
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.2))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    config = Config(
        model={"source": str(folder), "max_model_len": 80},
        cache={"block_size": worlds["BLOCK_SIZE"]},
        scheduler={"max_num_seqs": 5},
    )
    return make_plan(config, read_spec(folder))


def ids_of(runner: Runner, plan: Plan, num_steps: int) -> list[list[list[int]]]:
    results = worlds["run"](worlds["World"](36, plan.spec.vocab_size, 1), runner.launch, num_steps)
    return [step.token_ids for step in results]


def test_attentions_with_and_without_a_kernel_in_one_model(
    plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer with a window by kernels, the other by gathers; whole tables where all rows are of one token."""

    def some(spec: AttentionSpec, *arguments: Any) -> Any:
        return try_kernel(spec, *arguments) if spec.mask_spec.window else "not this one"

    monkeypatch.setattr(cuda_attention, "try_kernel", some)
    monkeypatch.setattr(cuda_layers, "substitute", lambda *_: None)  # attention blocks are the model's own
    expected = ids_of(worlds["make"](CPUBackend(CPU), plan, folder), plan, 7)
    runner = worlds["make"](CUDABackend(CPU), plan, folder)
    assert runner.attention._builder.mask_specs == {MaskSpec()}
    assert Substitution("paged_attention", 1, "not this one") in runner.substitutions
    assert ids_of(runner, plan, 7) == expected != []


def test_a_kernel_that_gives_something_else_is_not_used() -> None:
    spec = AttentionSpec("", 2, 1, 16, 16, MaskSpec(window=9), softcap=8.0, has_sinks=True)
    wrong = [replace(spec, mask_spec=MaskSpec(window=10)), replace(spec, softcap=9.0), replace(spec, has_sinks=False)]
    for one in wrong:
        kernel = PagedAttention(one, torch.float32, 16, CPU)
        assert isinstance(why_not(kernel, spec, torch.float32, 16, CPU), Deviation), one
