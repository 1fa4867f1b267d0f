"""Reads the index and the headers of safetensors files, and checks them before any weight is read."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.words.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"
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

    @property
    def range(self) -> tuple[int, int]:
        """Its bytes [first, end) in the file. Raises CheckpointError like `dtype`."""
        return self.offset, self.offset + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensors:
    """What the headers of a checkpoint's files say, and where its index says otherwise."""

    tensors: tuple[StoredTensor, ...]  # by file; a key may be in two files
    absent: Mapping[str, Path]  # keys that the index names, and no file holds → the file that should
    notes: tuple[str, ...]  # what is odd and does no harm, for people


def stored_tensors(folder: Path, named: str | None = None) -> StoredTensors:
    """Every tensor of a checkpoint, found as Transformers finds them; every header is read and checked.

    The index only says which files there are; their headers say what is in them. `named` is `transformers_weights` of
    config.json: the file or index to read instead of the usual ones. Raises CheckpointError that names file and tensor.
    """
    path = _entry_point(folder, named)
    if not path.name.endswith(_INDEX_SUFFIX):
        return StoredTensors(tuple(read_header(path).values()), {}, tuple(_unread(path)))
    index, _ = _read_index(path)
    headers = {file: read_header(file) for file in sorted(set(index.values()))}
    held = {key for header in headers.values() for key in header}
    absent = {key: file for key, file in index.items() if key not in held}
    oddities = {
        "names what no file holds": list(absent),
        "names the wrong file for": [key for key, file in index.items() if key in held and key not in headers[file]],
        "does not name": sorted(held - set(index)),
    }
    notes = [
        f"{path} {what}: {in_short(keys)}; the files' headers are followed" for what, keys in oddities.items() if keys
    ]
    return StoredTensors(
        tuple(one for header in headers.values() for one in header.values()), absent, (*_unread(path), *notes)
    )


def stored_dtype(folder: Path, named: str | None = None) -> str | None:
    """The floating dtype of a checkpoint as torch names it, chosen as by Transformers' dtype="auto" without a config's.

    It is the one that the index's metadata names, else that of the first file's first floating tensor by name; float8
    is passed over. None: nothing is stored in floating point. `named` and errors as for `stored_tensors`.
    """
    path = _entry_point(folder, named)
    if path.name.endswith(_INDEX_SUFFIX):
        files, dtype = _read_index(path)
        if dtype is not None:
            return dtype
        path = min(files.values())
    dtypes = [_DTYPES.get(tensor.stored_dtype) for _, tensor in sorted(read_header(path).items())]
    floating = (dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point)
    return next((str(dtype).removeprefix("torch.") for dtype in floating), None)


def in_short(keys: Sequence[str]) -> str:
    """Keys of tensors, for messages: the first three, and how many there are."""
    first = ", ".join(key[:100] for key in keys[:3])
    return f"{first}, ... ({len(keys)} in all)" if len(keys) > 3 else first


def _entry_point(folder: Path, named: str | None) -> Path:
    """The file or the index from which a checkpoint is read. Raises CheckpointError with what there is instead."""
    if named is not None:
        is_text = isinstance(named, str)  # config.json may say anything
        if not (is_text and _is_inside(named) and named.endswith((".safetensors", _INDEX_SUFFIX))):
            raise CheckpointError(
                f"{folder / 'config.json'}: transformers_weights {named!r} is no safetensors file or index beside it"
            )
        path = folder / named
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though transformers_weights in config.json names it")
        return path
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return folder / name
        if (folder / name).is_symlink():
            raise CheckpointError(f"{folder / name} is a link to a file that is not there; download it again")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    remedy = "it is no checkpoint of Transformers"
    if others:
        there = f"{others[0]} and {len(others) - 1} more" if others[1:] else others[0]
        remedy = f"there is {there}; download the index, or name the only file in config.json as transformers_weights"
    raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: {remedy}")


def _unread(path: Path) -> Iterator[str]:
    """Notes on files beside an entry point from which others might read weights."""
    if path.name == SINGLE_FILE and path.with_name(INDEX_FILE).is_file():
        yield f"{path} is read, as by Transformers, and not the files that {INDEX_FILE} beside it names"
    adapter = path.with_name("adapter_config.json")
    if adapter.is_file():
        yield f"{adapter} names an adapter, which is not applied; merge it into the weights if it is meant"


def _is_inside(name: str) -> bool:
    """Whether a file name stays in its folder; links are followed, as the hub's cache is made of them."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _read_index(path: Path) -> tuple[dict[str, Path], str | None]:
    """The file of every key that an index names, and the dtype that its metadata names, if any."""
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
        names = {str(key): str(name) for key, name in index["weight_map"].items()}
        dtype = index.get("metadata", {}).get("dtype")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {_error_in_short(error)}") from error
    if not names:
        raise CheckpointError(f"{path} is not an index of safetensors files: it names none")
    for name in sorted(set(names.values())):
        if not _is_inside(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {name[:200]}, which is no safetensors file in its folder")
        if not (path.parent / name).is_file():
            raise CheckpointError(
                f"{path.parent / name} is missing, though {path.name} names it; download the checkpoint again"
            )
    return {key: path.parent / name for key, name in names.items()}, None if dtype is None else str(dtype)


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
        raise CheckpointError(f"{file} is truncated or no safetensors file: {_error_in_short(error)}") from error
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


def _error_in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
