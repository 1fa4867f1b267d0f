"""Loads a rank's weights: reads only its own slices of the safetensors files, and accounts for every tensor."""

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.decisions.model.shard_plan import Interval, ShardPlan, TensorSlice
from actors.decisions.model.spec import ModelSpec
from actors.tensors.weights.conversion import Computed, ConversionGroup, Conversions
from actors.tensors.weights.lazy import Box, Lazy, Read
from actors.tensors.weights.leftovers import leave_out
from actors.tensors.weights.mapped import MappedFile, as_slices, byte_range, copied, fetch_ranges
from actors.tensors.weights.safetensors_index import in_short, stored_tensors
from actors.words.errors import CheckpointError

Source = Lazy | Computed | torch.Tensor  # of a tensor of the model; a tensor is the value itself
Progress = Callable[[int, int], None]  # bytes filled so far, bytes of this rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What loading read, and how long it took."""

    bytes_copied: int  # on the rank, in its own dtype
    seconds: float
    num_files: int
    computed: tuple[str, ...]  # tensors whose sources were read whole, because their conversion cannot be inverted
    fetched_bytes: int = 0  # of a checkpoint at a URL, by this rank: others of the node fetched the rest, or had it


@dataclass(frozen=True)
class Sources:
    """The stored tensors that make a rank's tensors: found and checked, but not read yet."""

    shard: ShardPlan
    by_target: dict[str, Source]
    conversions: Conversions
    twin: tuple[str, str, Lazy] | None  # a tied head that is stored beside the embedding: both keys, and the head


def find_sources(folder: Path, spec: ModelSpec, shard: ShardPlan, conversions: Conversions) -> Sources:
    """Find where a checkpoint holds a rank's tensors.

    The first rank logs what is left out, and what is odd. Raises CheckpointError, which names file and tensor, for
    what is missing, truncated, of another shape, quantized, or left over where it may change what the model answers.
    """
    stored = stored_tensors(folder, getattr(conversions.structure.config, "transformers_weights", None))
    groups, leftovers = conversions.groups(stored.tensors)
    notes = [*stored.notes, *leave_out(leftovers, spec, conversions.structure)]
    absent = {conversions.target_of(key)[0]: (key, file) for key, file in stored.absent.items()}
    for target in sorted(set(absent) & {name for name, group in groups.items() if group.converter is not None}):
        raise _absent(*absent[target])  # a part of what is converted together
    found, twin = _found(spec, shard, conversions, groups)
    started = {key: value for key, value in conversions.structure.initial.items() if key not in groups}
    if started:
        notes.append(f"not stored, and taken as {spec.architecture} starts with them: {in_short(sorted(started))}")
    by_target: dict[str, Source] = {}
    for tensor in shard.tensors:
        source = found.get(tensor.key, started.get(tensor.key))
        if source is None and tensor.key in absent:
            raise _absent(*absent[tensor.key])
        if source is None:
            raise CheckpointError(
                f"{folder} holds no tensor {tensor.key}, nor what it could be made of; download it again, or correct "
                "config.json"
            )
        by_target[tensor.name] = source
        _check(tensor, by_target[tensor.name], groups)
    computed = [name for name, source in by_target.items() if isinstance(source, Computed)]
    if computed:
        logger.warning(
            "%d tensors, %s first, are converted whole before they are cut: loading reads more than this rank's part",
            len(computed),
            computed[0],
        )
    for note in notes if shard.rank == 0 else ():
        logger.warning("%s", note)
    return Sources(shard, by_target, conversions, twin)


def _found(
    spec: ModelSpec, shard: ShardPlan, conversions: Conversions, groups: Mapping[str, ConversionGroup]
) -> tuple[dict[str, Lazy | Computed], tuple[str, str, Lazy] | None]:
    """The sources of a rank's tensors by key, as far as there are any, and the twin of a tied weight."""
    embedding, head = f"{spec.embedding_name}.weight", f"{spec.head_name}.weight"
    wanted = {tensor.key for tensor in shard.tensors} | ({head} if spec.tied_head else set())
    needed = {target: group for target, group in groups.items() if target not in spec.unused}
    found = conversions.sources(needed, wanted)
    tied = found.pop(head, None) if spec.tied_head else None
    if isinstance(tied, Lazy) and embedding in wanted:
        if embedding not in found:  # stored under its other name
            found[embedding] = tied
        elif shard.has_head:
            return found, (groups[head].keys, embedding, tied)
    return found, None


def _absent(key: str, file: Path) -> CheckpointError:
    return CheckpointError(f"{file} holds no tensor {key}, though the index says so; download it again")


def _check(tensor: TensorSlice, source: Source, groups: Mapping[str, ConversionGroup]) -> None:
    """Raises CheckpointError unless shape and kind of dtype of a lazy tensor are those of the model's."""
    if not isinstance(source, Lazy):
        return
    made_of = groups[tensor.key].keys if tensor.key in groups else tensor.key
    if not made_of.endswith(tensor.key):
        made_of += f" make {tensor.key}, which"
    if tuple(source.shape) != tensor.full_shape:
        raise CheckpointError(f"{made_of} is {list(source.shape)}, but config.json asks for {list(tensor.full_shape)}")
    wanted: torch.dtype = getattr(torch, tensor.dtype)
    if source.dtype.is_floating_point != wanted.is_floating_point:
        raise CheckpointError(f"{made_of} is stored as {source.dtype}, but the model holds {wanted}")


def load_weights(sources: Sources, tensors: Mapping[str, torch.Tensor], progress: Progress | None = None) -> LoadReport:
    """Fill a rank's tensors (name → tensor of the shard's shape, on any device, any dtype).

    Raises CheckpointError when a file cannot be read, or a tied head differs from the embedding.
    """
    started = time.monotonic()
    wanted = sources.shard.tensors
    assert set(tensors) == {tensor.name for tensor in wanted}, "tensors and shard plan disagree"
    total, filled = sum(tensor.nbytes for tensor in tensors.values()), 0
    reads: list[Read] = []
    for tensor in wanted:
        source, target = sources.by_target[tensor.name], tensors[tensor.name]
        assert target.shape == tensor.shape, f"{tensor.name}: {tuple(target.shape)} is not the shard's {tensor.shape}"
        if tensor.is_zero:
            filled += target.zero_().nbytes
        elif isinstance(source, Lazy):
            reads += _reads(source, tensor, target)
    fetched_bytes = fetch_ranges(_ranges(sources, reads))
    for num_bytes in copied(reads):
        filled += num_bytes
        if progress is not None:
            progress(filled, total)
    for tensor in wanted:
        source = sources.by_target[tensor.name]
        if not isinstance(source, Lazy) and not tensor.is_zero:
            whole = _compute(source, sources.conversions) if isinstance(source, Computed) else source
            filled += _slice_whole(whole, tensor, tensors[tensor.name])
            if progress is not None:
                progress(filled, total)
    assert filled == total, f"{filled} of {total} bytes were filled"
    _check_twin(sources, tensors)
    files = {read.stored.file for read in reads}
    computed = tuple(name for name, source in sources.by_target.items() if isinstance(source, Computed))
    return LoadReport(filled, time.monotonic() - started, len(files), computed, fetched_bytes)


def _ranges(sources: Sources, reads: Iterable[Read]) -> dict[Path, list[Interval]]:
    """The bytes of each file that loading reads, so that all are fetched at once where the checkpoint is a URL."""
    ranges: dict[Path, list[Interval]] = defaultdict(list)
    for read in reads:
        ranges[read.stored.file].append(byte_range(read))
    for source in sources.by_target.values():
        for stored in itertools.chain(*source.group.stored.values()) if isinstance(source, Computed) else ():
            ranges[stored.file].append(stored.range)
    return ranges


def boxes(intervals: tuple[tuple[Interval, ...], ...]) -> Iterator[tuple[Box, tuple[slice, ...]]]:
    """Every combination of intervals: a box of the whole tensor, and the slices that it fills in the shard's tensor."""
    dims = []
    for of_dim in intervals:
        ends = list(itertools.accumulate(end - first for first, end in of_dim))
        dims.append([(one, slice(end - one[1] + one[0], end)) for one, end in zip(of_dim, ends, strict=True)])
    for combination in itertools.product(*dims):
        yield tuple(interval for interval, _ in combination), tuple(part for _, part in combination)


def _reads(source: Lazy, tensor: TensorSlice, target: torch.Tensor) -> Iterator[Read]:
    for box, part in boxes(tensor.intervals):
        yield from source.reads(box, target[part])


def _compute(source: Computed, conversions: Conversions) -> torch.Tensor:
    """Compute a whole tensor, by Transformers' own conversion of all its sources."""
    group = source.group
    whole: dict[str, list[torch.Tensor]] = {}
    for pattern, of_pattern in group.stored.items():
        files = [MappedFile(stored.file, [stored.range]) for stored in of_pattern]
        whole[pattern] = [file.tensor(stored) for file, stored in zip(files, of_pattern, strict=True)]
        for file in files:
            file.close()
    made = group.convert(whole, conversions.structure)[source.name]
    assert isinstance(made, torch.Tensor)
    return made


def _slice_whole(whole: torch.Tensor, tensor: TensorSlice, target: torch.Tensor) -> int:
    if tuple(whole.shape) != tensor.full_shape:
        raise CheckpointError(
            f"{tensor.key} is {list(whole.shape)}, but config.json asks for {list(tensor.full_shape)}"
        )
    for box, part in boxes(tensor.intervals):
        target[part].copy_(whole[as_slices(box)])
    return target.nbytes


def _check_twin(sources: Sources, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError unless a tied head equals the embedding beside it; Transformers would untie the two."""
    if sources.twin is None:
        return
    name, embedding, twin = sources.twin
    tensor = next(tensor for tensor in sources.shard.tensors if tensor.key == embedding)
    expected = torch.empty_like(tensors[tensor.name])
    for _ in copied(_reads(twin, tensor, expected)):
        pass
    if not torch.equal(expected, tensors[tensor.name]):
        raise CheckpointError(
            f"{name} differs from {embedding}, but config.json ties them; "
            "set tie_word_embeddings to false in config.json"
        )
