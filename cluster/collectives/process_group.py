"""The process groups of torch.distributed, gloo for CPU tensors and NCCL for CUDA's, and a stage group over either.

They are made directly, without the global state of `init_process_group`: only so can gloo be bound to an address
without an environment variable, and several epochs live in one process one after the other.
"""

# ruff: noqa: SLF001 - what tells torch's backends their address and their patience has private names only
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions  # type: ignore[attr-defined]

from cluster.collectives.interface import NeighborLate, NeighborLost
from cluster.collectives.rendezvous import EpochStore

logger = logging.getLogger(__name__)

_SLICE = timedelta(seconds=0.1)  # how often a wait on gloo checks whether it was aborted
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class ProcessGroup(ABC):
    """One backend of torch.distributed over some ranks of the gang; `member` counts within the group."""

    def __init__(
        self, name: str, store: EpochStore, members: list[int], rank: int, connect: Callable[[Any, int, int], Any]
    ) -> None:
        """`connect` makes torch's backend from its part of the store, the own member number, and how many there are."""
        self.name = name
        self.size = len(members)
        self.member = members.index(rank)
        self.num_operations = 0  # begun so far
        self.aborted = threading.Event()
        # Construction blocks inside torch until all members are there: meet first, where waiting can be given up.
        store.roll_call(f"{name}/members", self.member, self.size)
        try:
            self._backend: Any = connect(store.part(f"{name}/group"), self.member, self.size)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: ranks {members} could not connect: {error}") from error

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the members, in place."""
        options = AllreduceOptions()
        options.asyncOp = False
        self.wait(self._backend_in_use().allreduce([tensor], options))

    def all_gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fill [size, *] with everybody's [*]."""
        options = AllgatherOptions()
        options.asyncOp = False
        self.wait(self._backend_in_use().allgather([list(gathered.unbind(0))], [tensor], options))

    @abstractmethod
    def wait(self, work: Any) -> None:
        """Return once what follows may use the result of an operation."""

    def abort(self) -> None:
        """Make every operation, now and later, raise RuntimeError. Any thread may call it."""
        self.aborted.set()

    def close(self) -> None:
        """Give the backend back. May be called twice."""
        if self._backend is not None:
            backend, self._backend = [self._backend], None
            self._release(backend)

    @abstractmethod
    def _release(self, last_reference: list[Any]) -> None:
        """End the backend; nobody else holds it."""

    def _backend_in_use(self) -> Any:
        if self._backend is None or self.aborted.is_set():
            raise NeighborLost(f"{self.name}: {'closed' if self._backend is None else 'aborted'}")
        self.num_operations += 1
        return self._backend


class GlooGroup(ProcessGroup):
    """A group over CPU tensors. It has no send and receive: `abort` could not end gloo's receive."""

    def __init__(
        self, name: str, store: EpochStore, members: list[int], rank: int, address: str, timeout_s: float
    ) -> None:
        """`timeout_s` is the time limit of one operation; nothing listens at another address than `address`."""
        self.timeout_s = timeout_s

        def connect(store: Any, member: int, size: int) -> Any:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timedelta(seconds=timeout_s)
            # By default gloo binds what the host's name resolves to, which may be another interface.
            options._devices = [gloo.create_device(hostname=address, lazy_init=False)]
            return gloo(store, member, size, options)

        super().__init__(name, store, members, rank, connect)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the members, in place; bfloat16 and float16 are summed in float32."""
        if tensor.dtype not in _LOW_PRECISION:
            super().all_reduce(tensor)
            return
        total = tensor.float()
        super().all_reduce(total)
        tensor.copy_(total)

    def barrier(self) -> None:
        """Return once every member came."""
        self.wait(self._backend_in_use().barrier())

    def wait(self, work: Any) -> None:
        """Block until the work is done. Raises NeighborLate, or NeighborLost when a member died or it was aborted."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError as error:
                if self.aborted.is_set():
                    raise NeighborLost(f"{self.name}: aborted") from None
                if "timed out" not in str(error).lower():
                    raise NeighborLost(f"{self.name}: {error}") from error
                if work.is_completed() or time.monotonic() > deadline:
                    raise NeighborLate(f"{self.name}: not done within {self.timeout_s:g} s") from None

    def _release(self, last_reference: list[Any]) -> None:
        if self.aborted.is_set():
            # Its destructor waits for work that is stuck, up to the timeout: not in the caller's thread.
            threading.Thread(target=last_reference.clear, name=f"drop {self.name}", daemon=True).start()


class NcclGroup(ProcessGroup):
    """A group over CUDA tensors, one device a member. Operations run in the order of the current stream."""

    def __init__(
        self, name: str, store: EpochStore, members: list[int], rank: int, device: torch.device, timeout_s: float
    ) -> None:
        """NCCL's own watchdog ends the process once an operation has taken longer than `timeout_s`."""

        def connect(store: Any, member: int, size: int) -> Any:
            nccl: Any = dist.ProcessGroupNCCL  # absent from CPU builds of torch
            options = nccl.Options()
            options._timeout = timedelta(seconds=timeout_s)
            backend = nccl(store, member, size, options)
            backend._set_sequence_number_for_group()
            backend.eager_connect_single_device(device)
            return backend

        super().__init__(name, store, members, rank, connect)

    def send(self, tensor: torch.Tensor, member: int) -> Any:
        """Start a send; the answer is for `wait`."""
        return self._backend_in_use().send([tensor], member, 0)

    def receive(self, tensor: torch.Tensor, member: int) -> None:
        """Fill a tensor."""
        self.wait(self._backend_in_use().recv([tensor], member, 0))

    def wait(self, work: Any) -> None:
        """Make the current stream wait for the work. Raises RuntimeError."""
        if work is not None:  # None: it ran on the current stream
            work.wait()

    def abort(self) -> None:
        """See ProcessGroup."""
        super().abort()
        backend = self._backend
        if backend is not None:
            backend.abort()

    def _release(self, last_reference: list[Any]) -> None:
        if not self.aborted.is_set():
            last_reference[0].shutdown()


class TorchStage:
    """A StageGroup over a ProcessGroup."""

    can_abort = True

    def __init__(self, group: ProcessGroup) -> None:
        self.size = group.size
        self.shard = group.member
        self._group = group

    @property
    def num_operations(self) -> int:
        """Operations begun so far."""
        return self._group.num_operations

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the shards, in place."""
        self._group.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[*] of every shard → [size, *]."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        self._group.all_gather(gathered, tensor)
        return gathered

    def abort(self) -> None:
        """Make every operation here, now and later, raise RuntimeError; neighbors notice when this rank closes."""
        self._group.abort()

    def close(self) -> None:
        """Give the group back. May be called twice."""
        self._group.close()
