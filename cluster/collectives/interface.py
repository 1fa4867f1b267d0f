"""The interfaces by which ranks exchange tensors, the same for NCCL, gloo and shared memory."""

import time
from typing import Protocol

import torch


class NeighborLost(RuntimeError):
    """Another rank left, was aborted, or could not be reached: the cause is there, not in this rank."""


class NeighborLate(NeighborLost, TimeoutError):
    """Another rank did not come in time."""


class StageGroup(Protocol):
    """The shards of one stage (tensor-parallel group). Every shard calls the same operations in the same order.

    Results have the same bits on every shard. Each operation raises NeighborLate when a neighbor does not come in
    time, and NeighborLost once the group was aborted.
    """

    size: int
    shard: int

    @property
    def can_abort(self) -> bool:
        """Whether `abort` ends an operation that waits for a neighbor; if not, only the end of the process does."""

    @property
    def num_operations(self) -> int:
        """Operations begun so far. Any thread may ask."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the shards; any shape, contiguous; in place where possible; returns the result."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Equal shapes [*] from every shard → [size, *], in shard order."""

    def abort(self) -> None:
        """Make every operation, now and later, raise NeighborLost, as far as `can_abort`. Any thread may call it."""

    def close(self) -> None:
        """Release what the group holds. May be called twice."""


class Sending(Protocol):
    """A send on its way; the tensor must not be written to before `wait` returned."""

    def wait(self) -> None:
        """Block until the buffer may be used again. Raises TimeoutError or RuntimeError."""


class Link(Protocol):
    """One direction between a rank and its neighbor stage."""

    def send(self, tensor: torch.Tensor) -> Sending:
        """Start to send a contiguous tensor and return at once."""

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor, shaped and typed as the sender's. Raises TimeoutError or RuntimeError."""


class PresentGroup:
    """The stage group that layers hold: it passes all calls on to the group of the present epoch."""

    def __init__(self, group: StageGroup) -> None:
        self.group = group
        self.size = group.size
        self.shard = group.shard
        self._seconds = 0.0

    @property
    def can_abort(self) -> bool:
        """See StageGroup."""
        return self.group.can_abort

    @property
    def num_operations(self) -> int:
        """See StageGroup."""
        return self.group.num_operations

    def take_seconds(self) -> float:
        """Seconds that operations took since the last call; on a GPU only their launch counts."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def add_seconds(self, seconds: float) -> None:
        """Count the seconds of exchanges that a kernel made by itself."""
        self._seconds += seconds

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See StageGroup."""
        began = time.perf_counter()
        result = self.group.all_reduce(tensor)
        self._seconds += time.perf_counter() - began
        return result

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See StageGroup."""
        began = time.perf_counter()
        result = self.group.all_gather(tensor)
        self._seconds += time.perf_counter() - began
        return result

    def abort(self) -> None:
        """See StageGroup."""
        self.group.abort()

    def close(self) -> None:
        """See StageGroup."""
        self.group.close()


class LoneShard:
    """The stage group of tensor_parallel_size 1: nothing to exchange."""

    size = 1
    shard = 0
    can_abort = True
    num_operations = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view [1, *]."""
        return tensor.unsqueeze(0)

    def abort(self) -> None:
        """Do nothing: no operation waits."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


def all_agree(group: StageGroup, mine: bool, device: torch.device) -> bool:
    """Whether every shard calls it with True. All shards must call it."""
    votes = group.all_reduce(torch.full((1,), float(mine), device=device))
    return votes.item() == group.size
