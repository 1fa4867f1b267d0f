"""Reads the index and the headers of safetensors files, and checks them before any weight is read."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.words.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 64  # torch's own limit; with the next one, it bounds the sizes that a header makes us multiply
_MAX_SIZE = 2**63 - 1
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a checkpoint holds a tensor."""

    file: Path
    key: str
    shape: tuple[int, ...]
    stored_dtype: str  # by the format's name
    offset: int  # bytes from the start of the file

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype. Raises CheckpointError for dtypes that cannot be read, above all of quantized weights."""
        if self.stored_dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.file}: {self.key} is stored as {self.stored_dtype}; readable are {', '.join(_DTYPES)}. "
                "Use an unquantized checkpoint"
            )
        return _DTYPES[self.stored_dtype]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its key, found as Transformers finds them; every header is read and checked.

    Raises CheckpointError that names the file and the tensor.
    """
    single, path = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if not path.is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    files = _read_index(path)
    headers = {file: read_header(file) for file in sorted(set(files.values()))}
    for key, file in files.items():
        if key not in headers[file]:
            raise CheckpointError(f"{file} holds no tensor {key}, though {INDEX_FILE} says so; download it again")
    for file, header in headers.items():
        for key in header:
            if files.get(key) != file:
                raise CheckpointError(f"{file} holds {key}, which {INDEX_FILE} does not say; download both again")
    return {key: headers[file][key] for key, file in files.items()}


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)["weight_map"]
        files = {str(key): path.parent / str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {_in_short(error)}") from error
    for file in sorted(set(files.values())):
        if file.parent != path.parent or file.suffix != ".safetensors":
            raise CheckpointError(f"{path} names {file}, which is no safetensors file beside it")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {path.name} names it; download the checkpoint again")
    return files


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; its header is checked for gaps, overlaps, and against the file's length.

    Format: https://huggingface.co/docs/safetensors (8 bytes of length, then JSON, then the data).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            num_bytes = int.from_bytes(stream.read(8), "little")
            if num_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file: its header would take {num_bytes} of {size} bytes"
                )
            header = json.loads(stream.read(num_bytes), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        start = 8 + num_bytes
        tensors = {key: _entry(file, key, entry, start) for key, entry in header.items()}
        ranges = sorted((*entry["data_offsets"], key) for key, entry in header.items())
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {_in_short(error)}") from error
    end = 0
    for first, last, key in ranges:
        if first != end:
            raise CheckpointError(f"{file}: {key} starts at byte {first} of the data, not at {end}; download it again")
        end = last
    if size != start + end:
        raise CheckpointError(f"{file} has {size} bytes where its header promises {start + end}; download it again")
    return tensors


def _entry(file: Path, key: str, entry: dict[str, Any], start: int) -> StoredTensor:
    """One entry of a header. Raises CheckpointError when shape, dtype and range of bytes do not agree."""
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    are_sizes = all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= _MAX_SIZE
        for size in (*shape, first, last)
    )
    if not are_sizes or len(shape) > _MAX_DIMS:
        raise CheckpointError(
            f"{file}: shape and data_offsets of {key[:200]} are not sizes of at most {_MAX_DIMS} dimensions; "
            "download it again"
        )
    stored = StoredTensor(file, key, tuple(shape), str(entry["dtype"]), start + first)
    known = _DTYPES.get(stored.stored_dtype)
    if known is not None and math.prod(shape) * known.itemsize != last - first:
        raise CheckpointError(
            f"{file}: {key} of shape {list(shape)} and dtype {stored.stored_dtype} does not take the "
            f"{last - first} bytes that data_offsets gives it; download it again"
        )
    return stored


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key[:200]} is there twice")
    return made


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
