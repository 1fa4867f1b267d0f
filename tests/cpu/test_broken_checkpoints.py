"""Broken checkpoints, one of each kind: refused at once, with file and tensor, before a byte of data is read."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.model.stage_model import build
from actors.words.errors import CheckpointError
from cluster.collectives.interface import LoneShard

ATTENTION = ReferenceBackend(torch.device("cpu")).attention([], torch.float32, 16)  # nobody attends here

pytestmark = pytest.mark.timeout(10)

NORM = "model.layers.2.input_layernorm.weight"
ATTN = "model.layers.2.self_attn"
INDEX = "model.safetensors.index.json"


class Folder:
    """A checkpoint to break."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weight_map: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
        self.names = sorted(set(self.weight_map.values()))
        self.file = path / self.weight_map[NORM]

    def index(self, text: str | None = None, **changes: str | None) -> None:
        weight_map = {key: name for key, name in {**self.weight_map, **changes}.items() if name is not None}
        (self.path / INDEX).write_text(text if text is not None else json.dumps({"weight_map": weight_map}))

    def tensors(self, **changes: torch.Tensor | None) -> None:
        tensors = {**load_file(self.file), **changes}
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, self.file)

    def header(self, change: Callable[[dict[str, Any]], Any], encode: Callable[[Any], str] = json.dumps) -> None:
        """Rewrite the header of the file; the data stays."""
        raw = self.file.read_bytes()
        [length] = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        changed = encode(change(header) or header).encode()
        self.file.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def entry(**keys: Any) -> Callable[[dict[str, Any]], None]:
    """Change the norm's entry of a header."""
    return lambda header: header[NORM].update(keys)


def swap_offsets(header: dict[str, Any]) -> None:
    first, second = list(header)[-2:]
    header[first]["data_offsets"], header[second]["data_offsets"] = ([0, 4], [2, 6])


def crowd(header: dict[str, Any]) -> None:
    """Tens of thousands of keys; the last one overlaps."""
    for number in range(50_000):
        header[f"x{number}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header["y"] = {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}


def twice(header: dict[str, Any]) -> str:
    text = json.dumps(header)
    return text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'


BREAKS: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "truncated by a byte": (lambda f: f.file.write_bytes(f.file.read_bytes()[:-1]), "its header promises"),
    "truncated in the header": (lambda f: f.file.write_bytes(f.file.read_bytes()[:40]), "header would take"),
    "truncated to nothing": (lambda f: f.file.write_bytes(b""), "truncated or no safetensors"),
    "longer than promised": (lambda f: f.file.write_bytes(f.file.read_bytes() + b"\0"), "its header promises"),
    "another format": (lambda f: f.file.write_bytes(b"PK\3\4" + b"\0" * 5000), "truncated or no safetensors"),
    "missing file": (lambda f: f.file.unlink(), "is missing, though"),
    "missing tensor": (lambda f: (f.tensors(**{NORM: None}), f.index(**{NORM: None})), f"holds no tensor {NORM}"),
    "tensor gone from its file": (lambda f: f.tensors(**{NORM: None}), f"holds no tensor {NORM}, though"),
    "wrong shape": (lambda f: f.tensors(**{NORM: torch.ones(32)}), rf"{NORM} is \[32\], .* asks for \[64\]"),
    "wrong number of dimensions": (lambda f: f.tensors(**{NORM: torch.ones(8, 8)}), rf"{NORM} is \[8, 8\]"),
    "float8": (lambda f: f.tensors(**{NORM: torch.ones(64).to(torch.float8_e4m3fn)}), f"{NORM} is stored as F8"),
    "integers": (lambda f: f.tensors(**{NORM: torch.ones(64, dtype=torch.int32)}), f"{NORM} is stored as torch.int32"),
    "extra tensor": (
        lambda f: (f.tensors(extra=torch.ones(1)), f.index(extra=f.file.name)),
        "holds extra, which LlamaForCausalLM has no place for",
    ),
    "tensor that the index leaves out": (
        lambda f: f.tensors(extra=torch.ones(1)),
        "holds extra, which .* no place for",
    ),
    "bias of a projection": (
        lambda f: f.tensors(**{f"{ATTN}.q_proj.bias": torch.ones(64)}),
        f"holds {ATTN}.q_proj.bias, which LlamaForCausalLM has no place for in {ATTN}.q_proj: .* Correct config.json",
    ),
    "norm of the queries": (
        lambda f: f.tensors(**{f"{ATTN}.q_norm.weight": torch.ones(8), f"{ATTN}.k_norm.weight": torch.ones(8)}),
        rf"holds {ATTN}.k_norm.weight \(and 1 more\), which .* no place for in {ATTN}:",
    ),
    "norm of the embedding": (
        lambda f: f.tensors(**{"model.embed_layernorm.weight": torch.ones(64)}),
        "holds model.embed_layernorm.weight, which .* no place for in model:",
    ),
    "bias of the head": (lambda f: f.tensors(**{"lm_head.bias": torch.ones(103)}), "no place for in lm_head:"),
    "scale of a weight": (
        lambda f: f.tensors(**{f"{ATTN}.q_proj.weight_scale": torch.ones(1), "extra": torch.ones(1)}),
        rf"holds {ATTN}.q_proj.weight_scale \(and 1 more\), a part of quantized weights",
    ),
    "adapter": (
        lambda f: f.tensors(**{f"base_model.model.{ATTN}.q_proj.lora_A.weight": torch.ones(4, 64)}),
        f"holds base_model.model.{ATTN}.q_proj.lora_A.weight, a part of an adapter; merge it",
    ),
    "tensor in two files": (
        lambda f: save_file({NORM: torch.ones(64)}, f.path / next(n for n in f.names if n != f.file.name)),
        f"both hold {NORM}",
    ),
    "index is no JSON": (lambda f: f.index("{"), "is not an index"),
    "index is a list": (lambda f: f.index("[]"), "is not an index"),
    "index without a map": (lambda f: f.index('{"weight_map": 3}'), "is not an index"),
    "index nested deeply": (lambda f: f.index("[" * 100_000), "is not an index"),
    "index of nothing": (lambda f: f.index('{"weight_map": {}}'), "it names none"),
    "index leads elsewhere": (lambda f: f.index(**{NORM: "../../etc/passwd"}), "no safetensors file in its folder"),
    "index names a pickle": (lambda f: f.index(**{NORM: "pytorch_model.bin"}), "no safetensors file in its folder"),
    "no index": (lambda f: (f.path / INDEX).unlink(), "neither .* there is .* and .* more; download the index"),
    "header of exabytes": (lambda f: f.file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "header would take"),
    "header nested deeply": (lambda f: f.header(dict, lambda _: "[" * 90_000), "truncated or no safetensors"),
    "header with a key twice": (lambda f: f.header(dict, twice), f"{NORM} is there twice"),
    "header of many keys": (lambda f: f.header(crowd), "starts at byte"),
    "shape of many dimensions": (lambda f: f.header(entry(shape=[10**300] * 2000)), "are not sizes|does not take"),
    "negative offset": (lambda f: f.header(entry(data_offsets=[-4, 252])), "are not sizes"),
    "offsets past the end": (lambda f: f.header(entry(data_offsets=[1 << 50, (1 << 50) + 256])), "starts at byte"),
    "offsets that overlap": (lambda f: f.header(swap_offsets), "does not take the 4 bytes|starts at byte"),
    "shape of petabytes": (lambda f: f.header(entry(shape=[1 << 40, 1 << 20])), "does not take the"),
    "shape of words": (lambda f: f.header(entry(shape=["many"])), "are not sizes"),
    "shape that is short": (lambda f: f.header(entry(shape=[63])), r"shape \[63\] .* does not take the 256 bytes"),
    "entry that is a number": (lambda f: f.header(lambda header: {**header, NORM: 3}), "truncated or no safetensors"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_refused(
    plan_of: Any, checkpoints: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = Folder(Path(shutil.copytree(checkpoints("llama"), tmp_path / "model")))
    breaks, words = BREAKS[name]
    breaks(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        build(plan_of("llama"), 0, folder.path, LoneShard(), torch.device("cpu"), ATTENTION)
    said = str(caught.value)
    assert str(folder.path) in said, "no file is named"
    assert len(said) < 700


def test_what_is_not_broken_is_built(plan_of: Any, checkpoints: Callable[[str], Path]) -> None:
    build(plan_of("llama"), 0, checkpoints("llama"), LoneShard(), torch.device("cpu"), ATTENTION)
    assert len(BREAKS) >= 25
