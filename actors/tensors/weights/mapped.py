"""Maps safetensors files into memory: parts are copied straight from the page cache, and prefetched from disk."""

import itertools
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from actors.stores.fetch import fetch, fetch_all
from actors.stores.intervals import Interval
from actors.stores.mirror import mirror_of
from actors.tensors.weights.lazy import Box, Read
from actors.tensors.weights.safetensors_index import StoredTensor
from actors.words.errors import CheckpointError

_PIECE_BYTES = 1024 * 1024  # of one prefetch
_AHEAD_BYTES = 64 * 1024 * 1024  # prefetched ahead of the copy


class MappedFile:
    """One file. Bytes that several ranks of a node read come from disk once: all copy from the page cache."""

    def __init__(self, file: Path, ranges: Sequence[Interval]) -> None:
        """`ranges` of bytes that will be read, and no others: of a copy from an object store the rest is not there."""
        fetch_ranges({file: ranges})
        num_bytes = max(end for _, end in ranges)
        try:
            with file.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < num_bytes:
                    raise CheckpointError(f"{file} has become shorter since its header was read; download it again")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                self._descriptor = os.dup(stream.fileno())
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error

    def close(self) -> None:
        """Close the descriptor; the map is freed with the last tensor."""
        os.close(self._descriptor)

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The whole of a stored tensor, without a copy."""
        numel = math.prod(stored.shape)
        if numel == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return torch.frombuffer(self._map, dtype=stored.dtype, count=numel, offset=stored.offset).view(stored.shape)

    def prefetch(self, first: int, end: int) -> None:
        """Have the kernel read bytes [first, end), without waiting; in pieces, as it truncates long ranges."""
        for start in range(first, end, _PIECE_BYTES):
            os.posix_fadvise(self._descriptor, start, min(_PIECE_BYTES, end - start), os.POSIX_FADV_WILLNEED)


def fetch_ranges(ranges: Mapping[Path, Iterable[Interval]]) -> int:
    """Fetch ranges of files that are copies from an object store, as far as they are not there → bytes fetched here.

    Raises CheckpointError, as `stores.fetch`.
    """
    fetched_bytes = 0
    for folder, of_folder in itertools.groupby(sorted(ranges), key=lambda file: file.parent):
        if (mirror := mirror_of(folder)) is not None:
            fetched_bytes += fetch(mirror, {file.name: ranges[file] for file in of_folder})
    return fetched_bytes


def fetch_weights(folder: Path) -> None:
    """Fetch all weights of a folder that is a copy from an object store, for who reads them by other means than ours.

    Raises CheckpointError, as `stores.fetch`.
    """
    if (mirror := mirror_of(folder)) is not None:
        fetch_all(mirror)


def copied(reads: Iterable[Read]) -> Iterator[int]:
    """Do all reads, in the order of the files; after each one, yield the bytes that it filled."""
    ordered = sorted(reads, key=lambda read: (read.stored.file, byte_range(read)))
    for file, of_file in itertools.groupby(ordered, key=lambda read: read.stored.file):
        batch = list(of_file)
        mapped = MappedFile(file, [byte_range(read) for read in batch])
        try:
            num_prefetched, prefetched_end = 0, 0  # reads of the batch; bytes of the file
            for read in batch:
                until = byte_range(read)[1] + _AHEAD_BYTES
                while num_prefetched < len(batch) and byte_range(batch[num_prefetched])[0] < until:
                    first, end = byte_range(batch[num_prefetched])
                    mapped.prefetch(max(first, prefetched_end), end)
                    num_prefetched, prefetched_end = num_prefetched + 1, max(prefetched_end, end)
                read.target.copy_(mapped.tensor(read.stored)[as_slices(read.box)])
                yield read.target.nbytes
        finally:
            mapped.close()


def as_slices(box: Box) -> tuple[slice, ...]:
    """A box as slices, for indexing."""
    return tuple(slice(first, end) for first, end in box)


def byte_range(read: Read) -> tuple[int, int]:
    """The smallest byte range [first, end) of the file that contains a read."""
    if any(first >= end for first, end in read.box):
        return read.stored.offset, read.stored.offset
    first = last = 0
    for (start, end), size in zip(read.box, read.stored.shape, strict=True):
        first, last = first * size + start, last * size + end - 1
    itemsize = read.stored.dtype.itemsize
    return read.stored.offset + first * itemsize, read.stored.offset + (last + 1) * itemsize
