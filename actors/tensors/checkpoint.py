"""Loads a rank's weights: reads only its own slices of the safetensors files, and accounts for every tensor."""

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from actors.decisions.model_spec import ModelSpec
from actors.decisions.shard_plan import Interval, ShardPlan, TensorSlice
from actors.words.errors import CheckpointError

Progress = Callable[[int, int], None]  # bytes filled so far, bytes of this rank

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PIECE_BYTES = 64 * 1024 * 1024  # read at once, so that a large slice is never held twice
_READABLE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class LoadReport:
    """What loading took."""

    bytes_copied: int  # on the rank, in its own dtype
    seconds: float
    num_files: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a checkpoint holds a tensor."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int  # bytes from the start of the file's data


def load_weights(
    folder: Path,
    spec: ModelSpec,
    shard: ShardPlan,
    parameters: Mapping[str, torch.Tensor],
    ignorable_keys: Collection[str],
    progress: Progress | None = None,
) -> LoadReport:
    """Fill a rank's parameters (name → tensor of the shard's shape, on any device, any float dtype).

    Raises CheckpointError that names the file and the tensor, for whatever is missing, left over, truncated, of another
    shape, or quantised.
    """
    started = time.monotonic()
    assert set(parameters) == {tensor.name for tensor in shard.tensors}, "parameters and shard plan disagree"
    files = index(folder)
    _refuse_leftovers(files, spec, ignorable_keys)
    stored = _locate([(_key(spec, tensor, files), tensor.full_shape) for tensor in shard.tensors], files, folder)
    jobs = sorted(zip(stored, shard.tensors, strict=True), key=lambda job: (job[0].file, job[0].offset))
    filled = 0
    for file, jobs_of_file in itertools.groupby(jobs, key=lambda job: job[0].file):
        with _Opened(file) as reader:
            for where, tensor in jobs_of_file:
                filled += _fill(parameters[tensor.name], where, tensor, reader)
                if progress is not None:
                    progress(filled, shard.weight_bytes)
    assert filled == sum(parameter.nbytes for parameter in parameters.values())
    _check_tied_twin(spec, shard, parameters, files, folder)
    return LoadReport(filled, time.monotonic() - started, len({where.file for where in stored}))


def index(folder: Path) -> dict[str, Path]:
    """Every key of the checkpoint and the file that holds it, found as Transformers finds them."""
    single, path = folder / _SINGLE_FILE, folder / _INDEX_FILE
    if single.is_file():
        return dict.fromkeys(read_header(single), single)
    if not path.is_file():
        raise CheckpointError(f"{folder} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {str(key): folder / str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error!r}") from error
    for file in sorted(set(files.values())):
        if file.parent != folder or file.suffix != ".safetensors":
            raise CheckpointError(f"{path} names {file}, which is no safetensors file beside it")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {path.name} names it; download the checkpoint again")
    return files


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file says it holds; its length is checked against that.

    Format: https://huggingface.co/docs/safetensors (8 bytes of length, then JSON, then the data).
    """
    try:
        with file.open("rb") as stream:
            num_bytes = int.from_bytes(stream.read(8), "little")
            if num_bytes > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} is no safetensors file: its header would take {num_bytes} bytes")
            header = json.loads(stream.read(num_bytes))
        header.pop("__metadata__", None)
        tensors = {
            key: StoredTensor(file, key, tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][0])
            for key, entry in header.items()
        }
        expected = 8 + num_bytes + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is truncated or no safetensors file: {error!r}") from error
    if file.stat().st_size != expected:
        raise CheckpointError(
            f"{file} has {file.stat().st_size} bytes where its header promises {expected}; download it again"
        )
    return tensors


def _refuse_leftovers(files: Mapping[str, Path], spec: ModelSpec, ignorable_keys: Collection[str]) -> None:
    known = {parameter.name for parameter in spec.parameters} | {f"{spec.head_name}.weight"}
    for key, file in files.items():
        if key not in known and not any(re.search(pattern, key) for pattern in ignorable_keys):
            raise CheckpointError(
                f"{file} holds {key}, which {spec.architecture} has no place for; it would be silently left out"
            )


def _key(spec: ModelSpec, tensor: TensorSlice, files: Mapping[str, Path]) -> str:
    """The key to read: a tied weight may be stored under either of its two names."""
    head = f"{spec.head_name}.weight"
    if spec.tied_head and tensor.key == f"{spec.embedding_name}.weight" and tensor.key not in files and head in files:
        return head
    return tensor.key


def _locate(wanted: list[tuple[str, tuple[int, ...]]], files: Mapping[str, Path], folder: Path) -> list[StoredTensor]:
    """Where the wanted keys lie, each checked against the full shape and for a dtype that can be read."""
    headers: dict[Path, dict[str, StoredTensor]] = {}
    located = []
    for key, full_shape in wanted:
        file = files.get(key)
        if file is None:
            raise CheckpointError(f"{folder} holds no tensor {key}")
        if file not in headers:
            headers[file] = read_header(file)
        where = headers[file].get(key)
        if where is None:
            raise CheckpointError(f"{file} holds no tensor {key}, though {_INDEX_FILE} says so; download it again")
        if where.shape != full_shape:
            raise CheckpointError(f"{file}: {key} is {list(where.shape)}, but config.json asks for {list(full_shape)}")
        if where.dtype not in _READABLE:
            raise CheckpointError(f"{file}: {key} is stored as {where.dtype}; readable are {', '.join(_READABLE)}")
        located.append(where)
    return located


class _Opened:
    """safe_open whose errors name the file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.reader: Any = safe_open(self.file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}") from error

    def __enter__(self) -> Any:
        return self.reader

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"{self.file} cannot be read: {error}") from error


def _fill(parameter: torch.Tensor, where: StoredTensor, tensor: TensorSlice, reader: Any) -> int:
    """Copy one slice into its parameter, piece by piece; returns the bytes filled."""
    assert parameter.shape == tensor.shape, f"{tensor.name}: {tuple(parameter.shape)} is not the shard's {tensor.shape}"
    source = reader.get_slice(where.key)
    filled = 0
    for source_slices, target_slices in pieces(tensor.intervals, _READABLE[where.dtype]):
        target = parameter[target_slices]
        target.copy_(source[source_slices])
        filled += target.nbytes
    return filled


def pieces(
    intervals: tuple[tuple[Interval, ...], ...], itemsize: int, piece_bytes: int = _PIECE_BYTES
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """(slices of the stored tensor, slices of the shard's): the intervals, cut along dimension 0 into small pieces."""
    row_bytes = itemsize * math.prod(sum(end - first for first, end in dim) for dim in intervals[1:])
    rows_at_once = max(1, piece_bytes // max(1, row_bytes))
    dims = [list(_placed(dim, rows_at_once if axis == 0 else None)) for axis, dim in enumerate(intervals)]
    for combination in itertools.product(*dims):
        yield tuple(source for source, _ in combination), tuple(target for _, target in combination)


def _placed(dim: tuple[Interval, ...], at_once: int | None) -> Iterator[tuple[slice, slice]]:
    """The intervals of one dimension, joined in order on the shard, cut into runs of at most `at_once`."""
    place = 0
    for first, end in dim:
        for begin in range(first, end, at_once or max(1, end - first)):
            length = min(at_once or end - first, end - begin)
            yield slice(begin, begin + length), slice(place, place + length)
            place += length


def _check_tied_twin(
    spec: ModelSpec,
    shard: ShardPlan,
    parameters: Mapping[str, torch.Tensor],
    files: Mapping[str, Path],
    folder: Path,
) -> None:
    """A tied head stored beside the embedding must equal it: Transformers unties the two when they differ."""
    head, embedding = f"{spec.head_name}.weight", f"{spec.embedding_name}.weight"
    if not (spec.tied_head and shard.has_head and head in files and embedding in files):
        return
    tensor = next(tensor for tensor in shard.tensors if tensor.key == embedding)
    [where] = _locate([(head, tensor.full_shape)], files, folder)
    with _Opened(where.file) as reader:
        source = reader.get_slice(head)
        for source_slices, target_slices in pieces(tensor.intervals, _READABLE[where.dtype]):
            loaded = parameters[tensor.name][target_slices]
            if not torch.equal(source[source_slices].to(loaded), loaded):
                raise CheckpointError(
                    f"{where.file}: {head} differs from {embedding}, but config.json ties them; "
                    "set tie_word_embeddings to false in config.json"
                )
