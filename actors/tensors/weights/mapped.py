"""A safetensors file mapped into memory: parts are copied straight from the page cache, and the disk is asked ahead."""

import itertools
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from actors.tensors.weights.lazy import Box, Read
from actors.tensors.weights.safetensors_index import StoredTensor
from actors.words.errors import CheckpointError

_PIECE_BYTES = 1024 * 1024  # asked for at once
_AHEAD_BYTES = 64 * 1024 * 1024  # on their way from the disk while something is copied


class MappedFile:
    """One file. Ranks of a node that read the same bytes read them from the disk once: all copy from the page cache."""

    def __init__(self, file: Path, num_bytes: int) -> None:
        """`num_bytes`: how far it is going to be read."""
        try:
            with file.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < num_bytes:
                    raise CheckpointError(f"{file} has become shorter since its header was read; download it again")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                self._descriptor = os.dup(stream.fileno())
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error

    def close(self) -> None:
        """The map itself goes with the last tensor."""
        os.close(self._descriptor)

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The whole of a stored tensor, without a copy."""
        numel = math.prod(stored.shape)
        if numel == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return torch.frombuffer(self._map, dtype=stored.dtype, count=numel, offset=stored.offset).view(stored.shape)

    def fetch(self, first: int, end: int) -> None:
        """Ask the kernel to read a range of bytes, without waiting; in pieces, as it cuts short what is long."""
        for start in range(first, end, _PIECE_BYTES):
            os.posix_fadvise(self._descriptor, start, min(_PIECE_BYTES, end - start), os.POSIX_FADV_WILLNEED)


def copied(reads: Iterable[Read]) -> Iterator[int]:
    """Do all reads, in the order of the files; after each, the bytes that it filled."""
    ordered = sorted(reads, key=lambda read: (read.stored.file, byte_range(read)))
    for file, of_file in itertools.groupby(ordered, key=lambda read: read.stored.file):
        batch = list(of_file)
        mapped = MappedFile(file, max(byte_range(read)[1] for read in batch))
        try:
            fetched, asked = 0, 0  # reads of the batch that are asked for; the end of what is
            for read in batch:
                until = byte_range(read)[1] + _AHEAD_BYTES
                while fetched < len(batch) and byte_range(batch[fetched])[0] < until:
                    first, end = byte_range(batch[fetched])
                    mapped.fetch(max(first, asked), end)
                    fetched, asked = fetched + 1, max(asked, end)
                read.target.copy_(mapped.tensor(read.stored)[as_slices(read.box)])
                yield read.target.nbytes
        finally:
            mapped.close()


def as_slices(box: Box) -> tuple[slice, ...]:
    """For indexing."""
    return tuple(slice(first, end) for first, end in box)


def byte_range(read: Read) -> tuple[int, int]:
    """[first, end) of the bytes of the file between which a read lies."""
    if any(first >= end for first, end in read.box):
        return read.stored.offset, read.stored.offset
    first = last = 0
    for (start, end), size in zip(read.box, read.stored.shape, strict=True):
        first, last = first * size + start, last * size + end - 1
    itemsize = read.stored.dtype.itemsize
    return read.stored.offset + first * itemsize, read.stored.offset + (last + 1) * itemsize
