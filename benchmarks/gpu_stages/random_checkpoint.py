"""Writes a checkpoint of random bytes with a tokenizer to fit, as fast as the disk takes it."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gpu_stages.random_model import config_of
from gpu_stages.stages import CannotRun

NUM_FILES = 4
POOL_NUMBERS = 1 << 24  # random numbers, which are written again and again
SPREAD = 0.02


def write_checkpoint(folder: Path, shape: str, dtype: str) -> int:
    """→ the bytes of its weights. Raises CannotRun where they do not fit."""
    config = config_of(shape, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    num_bytes = sum(map(math.prod, shapes.values())) * config.dtype.itemsize
    room = shutil.disk_usage(folder).free
    if room < 1.1 * num_bytes:
        raise CannotRun(f"{folder} has room for {room / 1e9:.0f} GB, and the checkpoint takes {num_bytes / 1e9:.0f}")
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    pool = (torch.randn(POOL_NUMBERS) * SPREAD).to(config.dtype)
    files = {f"model-{index + 1:05}-of-{NUM_FILES:05}.safetensors": list(shapes)[index::NUM_FILES]
             for index in range(NUM_FILES)}  # fmt: skip
    with ThreadPoolExecutor(NUM_FILES) as threads:
        list(threads.map(lambda file: write_file(folder / file[0], file[1], shapes, pool), files.items()))
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def write_file(path: Path, names: list[str], shapes: dict[str, tuple[int, ...]], pool: torch.Tensor) -> None:
    """A safetensors file: norms are ones, all else random."""
    dtype_name = {torch.bfloat16: "BF16", torch.float32: "F32"}[pool.dtype]
    header, end = {}, 0
    for name in names:
        begin, end = end, end + math.prod(shapes[name]) * pool.dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": shapes[name], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random, ones = (memoryview(one.view(torch.uint8).numpy()) for one in (pool, torch.ones_like(pool)))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            source = ones if "norm" in name else random
            for left in range(math.prod(shapes[name]) * pool.dtype.itemsize, 0, -len(source)):
                file.write(source[: min(left, len(source))])


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word for each id."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
