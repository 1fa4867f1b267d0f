"""Kernels in Triton without a GPU: their numbers by the interpreter, and their machine code for two GPUs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from actors.decisions.model.spec import AttentionSpec, MaskSpec
from actors.tensors.attention.metadata import LayerCache, PagedRows
from actors.tensors.backends.cuda import attention_kernels, layer_kernels, rotary_kernels, sampling_kernels
from actors.tensors.backends.cuda.attention_trial import why_no_kernels
from actors.tensors.backends.cuda.layer_kernels import Norm
from actors.tensors.backends.cuda.paged_attention import PagedAttention, Processor

CPU = torch.device("cpu")
INTERPRETED = [str(Path(__file__).with_name(f"interpreted_{what}.py")) for what in ("attention", "layers", "sampling")]
SHARED_BYTES = 99 << 10  # what a program may have on every GPU since Ampere; A100 and H100 have more


def interpret(*arguments: str, timeout_s: float) -> None:
    command = [sys.executable, "-m", "pytest", *INTERPRETED, "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert re.search(r"\d+ passed", child.stdout) and "skipped" not in child.stdout


@pytest.mark.timeout(400)
def test_interpreted_kernels_give_the_right_numbers() -> None:
    interpret(timeout_s=380)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_interpreted_kernels_give_the_right_numbers_for_all_shapes() -> None:
    interpret("-m", "soak", timeout_s=3500)


def test_kernels_that_are_not_interpreted_do_not_run_on_a_cpu() -> None:
    assert why_no_kernels(CPU) == "it runs on CUDA, not on cpu"


class Compiled(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int


class FakeDriver:
    """As much of Triton's driver as compiling asks for: which GPU is there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """compile_for(capability, work): what the launches of some work compile, by the kernel's name."""
    found: dict[str, Compiled] = {}  # what takes the most, where a kernel is compiled several times
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        new = Compiled(*resources(kernel.asm["cubin"], tmp_path), kernel.metadata.shared)
        found[self.fn.__name__] = Compiled(*map(max, new, found.get(self.fn.__name__, new)))

    def compile_for(capability: int, work: Callable[[], None]) -> dict[str, Compiled]:
        monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver(capability))
        monkeypatch.setattr(Processor, "of", lambda device: Processor(132, capability == 90))
        work()
        return found

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    yield compile_for
    modules = attention_kernels, layer_kernels, rotary_kernels, sampling_kernels
    for kernel in [kernel for module in modules for kernel in vars(module).values()]:
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()


def launch_attention(spec: AttentionSpec, dtype: torch.dtype = torch.bfloat16) -> None:
    """Launch what a mixed step launches, with tensors of the usual layouts."""
    keys = torch.empty(4, 16, spec.num_kv_heads, spec.key_dim, dtype=dtype)
    values = torch.empty(4, 16, spec.num_kv_heads, spec.value_dim, dtype=dtype)
    query_ThD = torch.empty(5, spec.num_heads, spec.key_dim, dtype=dtype)
    tables_SN, lengths_S = torch.zeros(2, 2, dtype=torch.int32), torch.tensor([20, 4], dtype=torch.int32)
    rows = PagedRows(tables_SN, lengths_S, torch.tensor([0, 1, 5], dtype=torch.int32), 5, 1, 4, 20)
    sinks = torch.empty(spec.num_heads, dtype=dtype) if spec.has_sinks else None
    kernel = PagedAttention(spec, dtype, 16, CPU)
    cache = LayerCache(spec, keys, values)
    kernel.attend(cache, query_ThD.transpose(0, 1), rows, kernel.plan(rows), 0.1, sinks)


def launch_a_layer(spec: AttentionSpec, hidden: int, inner: int) -> None:
    """Launch what a layer of Llama's form launches beside products and attention, in bfloat16."""
    (heads, kv_heads, size), new = (spec.num_heads, spec.num_kv_heads, spec.key_dim), torch.empty
    cache = LayerCache(spec, *new(2, 4, 16, kv_heads, size, dtype=torch.bfloat16))
    product, angles = new(1, 5, (heads + 2 * kv_heads) * size, dtype=torch.bfloat16), new(1, 5, size).bfloat16()
    slots, whole = torch.zeros(5, dtype=torch.int64), new(heads * size).bfloat16()
    for number, angle_dim in enumerate((size, size // 2)):
        weights = [(angles[0, 0], angles[0, 0]), (whole, whole[: kv_heads * size])][number]
        norms, some = rotary_kernels.HeadNorms(*(Norm(one, 1e-5, True) for one in weights)), angles[..., :angle_dim]
        for rotation in rotary_kernels.rotations(angle_dim, size):
            rotary_kernels.rotate_and_store(product, some, some, rotation, norms, slots, cache, heads)
    layer_kernels.gate(new(1, 5, 2 * inner, dtype=torch.bfloat16), "silu")
    x, norm = new(1, 5, hidden, dtype=torch.bfloat16), Norm(new(hidden), 1e-5, True)
    for norm_of_y in (norm, None):
        layer_kernels.add_rms_norm(x, x, norm, norm_of_y)


def launch_a_search(num_tokens: int) -> None:
    """Launch the search of a whole vocabulary."""
    scores_UV, number_U1 = torch.empty(2, num_tokens), torch.empty(2, 1)
    known_U1, top_k_U1 = torch.zeros(2, 1, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int64)
    sampling_kernels.lowest_kept(scores_UV, number_U1, known_U1, top_k_U1, number_U1.double())


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


SPECS = {
    "llama8b": AttentionSpec("", 32, 8, 128, 128),
    "llama70b, one of 8": AttentionSpec("", 8, 1, 128, 128),
    "gemma2": AttentionSpec("", 8, 4, 256, 256, MaskSpec(4096), 50.0),
    "gpt_oss": AttentionSpec("", 64, 8, 64, 64, MaskSpec(128), None, True),
    "llama4": AttentionSpec("", 40, 8, 128, 128, MaskSpec(None, 8192)),
    "qwen3_moe": AttentionSpec("", 64, 4, 128, 128),
    "phi3": AttentionSpec("", 32, 32, 96, 96),
    "phi2": AttentionSpec("", 32, 32, 80, 80),
    "falcon": AttentionSpec("", 71, 1, 64, 64),
    "deepseek": AttentionSpec("", 16, 16, 192, 128),
    "deepseek, absorbed": AttentionSpec("", 128, 1, 576, 512),
}
ALWAYS = [(90, "llama8b"), (90, "gemma2"), (90, "gpt_oss"), (80, "llama8b")]


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        pytest.param(capability, name, marks=[] if (capability, name) in ALWAYS else [pytest.mark.soak])
        for capability in (90, 80)
        for name in SPECS
    ],
)
def test_machine_code_fits_and_spills_nothing(
    capability: int, name: str, compile_for: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = compile_for(capability, lambda: launch_attention(SPECS[name]))
    with capsys.disabled():
        for kernel in ("attend_splits", "attend_chunks"):
            print(f"\n  sm_{capability}, {name}: {kernel}: {kernels[kernel]}", end="")
    assert set(kernels) == {"plan_work", "attend_splits", "merge_splits", "attend_chunks"}
    assert all(one.shared_bytes <= SHARED_BYTES and one.spilled_bytes == 0 for one in kernels.values())


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.soak)])
def test_machine_code_of_a_layer_spills_nothing(capability: int, compile_for: Any) -> None:
    """Of Llama 70B, whose rows are the longest."""
    kernels = compile_for(capability, lambda: launch_a_layer(AttentionSpec("", 64, 8, 128, 128), 8192, 28672))
    assert set(kernels) == {"_add_rms_norm", "_gate", "_rotate_and_store"}
    assert all(one.registers <= 128 and one.spilled_bytes == 0 for one in kernels.values()), kernels


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.soak)])
def test_machine_code_of_the_search_spills_nothing(capability: int, compile_for: Any) -> None:
    kernels = compile_for(capability, lambda: launch_a_search(128256))
    assert set(kernels) == {"_lowest_kept"}
    assert kernels["_lowest_kept"].spilled_bytes == 0, kernels
