"""The groups that torch.distributed gives: NCCL on CUDA, gloo on CPU, behind the interfaces of `collectives`.

The backends are made directly, without the global state of `init_process_group`: only so can gloo be bound to an
address without an environment variable, and several epochs live in one process one after the other.
"""

# ruff: noqa: SLF001 - what tells torch's backends their address and their patience has private names only
import logging
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions  # type: ignore[attr-defined]

from cluster.collectives.interface import NeighbourLate, NeighbourLost
from cluster.collectives.rendezvous import EpochStore

logger = logging.getLogger(__name__)

_SLICE = timedelta(seconds=0.1)  # how often a wait on gloo looks whether it was aborted
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class ProcessGroup:
    """One backend of torch.distributed over some ranks of the gang; `member` counts within the group."""

    def __init__(
        self, name: str, store: EpochStore, members: list[int], rank: int, device: torch.device, address: str,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.name = name
        self.size = len(members)
        self.member = members.index(rank)
        self.device = device
        self.timeout_s = timeout_s
        self.num_operations = 0  # begun so far
        self.aborted = threading.Event()
        # Construction blocks inside torch until all members are there: meet first, where waiting can be given up.
        store.roll_call(f"{name}/members", self.member, self.size)
        try:
            make = _make_nccl if device.type == "cuda" else _make_gloo
            self._backend: Any = make(self, store.part(f"{name}/group"), address)
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

    def barrier(self) -> None:
        """Return once every member came. CPU groups only."""
        self.wait(self._backend_in_use().barrier())

    def send(self, tensor: torch.Tensor, member: int) -> Any:
        """Start a send; the answer is for `wait`. CUDA only."""
        assert self.device.type == "cuda", "gloo's receive cannot be woken: links on CPU are sockets"
        return self._backend_in_use().send([tensor], member, 0)

    def receive(self, tensor: torch.Tensor, member: int) -> None:
        """Fill a tensor. CUDA only."""
        assert self.device.type == "cuda", "gloo's receive cannot be woken: links on CPU are sockets"
        self.wait(self._backend_in_use().recv([tensor], member, 0))

    def wait(self, work: Any) -> None:
        """Block until the work is done (CPU), or make the current stream wait for it (CUDA).

        Raises TimeoutError, or RuntimeError when a member died or the group was aborted. On CUDA, NCCL's own watchdog
        ends the process once an operation has taken longer than the timeout.
        """
        if work is None:  # NCCL ran it on the current stream
            return
        if self.device.type == "cuda":
            work.wait()
            return
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError as error:
                if self.aborted.is_set():
                    raise NeighbourLost(f"{self.name}: aborted") from None
                if "timed out" not in str(error).lower():
                    raise NeighbourLost(f"{self.name}: {error}") from error
                if work.is_completed() or time.monotonic() > deadline:
                    raise NeighbourLate(f"{self.name}: not done within {self.timeout_s:g} s") from None

    def abort(self) -> None:
        """Make who waits, now or later, leave with RuntimeError. Any thread may call it."""
        self.aborted.set()
        backend = self._backend
        if backend is not None and self.device.type == "cuda":
            backend.abort()

    def close(self) -> None:
        """Give the backend back. May be called twice."""
        if self._backend is None:
            return
        last_reference, self._backend = [self._backend], None
        if self.device.type == "cuda":
            if not self.aborted.is_set():
                last_reference[0].shutdown()
        elif self.aborted.is_set():
            # Its destructor waits for work that is stuck, up to the timeout: not on the caller's time.
            threading.Thread(target=last_reference.clear, name=f"drop {self.name}", daemon=True).start()

    def _backend_in_use(self) -> Any:
        if self._backend is None or self.aborted.is_set():
            raise NeighbourLost(f"{self.name}: {'closed' if self._backend is None else 'aborted'}")
        self.num_operations += 1
        return self._backend


class TorchStage:
    """A StageGroup over a ProcessGroup."""

    def __init__(self, group: ProcessGroup) -> None:
        self.size = group.size
        self.shard = group.member
        self._group = group

    @property
    def num_operations(self) -> int:
        """Begun so far."""
        return self._group.num_operations

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the shards, in place; on CPU, bfloat16 and float16 are summed in float32."""
        if tensor.is_cpu and tensor.dtype in _LOW_PRECISION:
            wide = tensor.float()
            self._group.all_reduce(wide)
            return tensor.copy_(wide)
        self._group.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[*] of every shard → [size, *]."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        self._group.all_gather(gathered, tensor)
        return gathered

    def abort(self) -> None:
        """Make every operation, now or later, end with RuntimeError here; neighbours notice when this rank closes."""
        self._group.abort()

    def close(self) -> None:
        """Give the group back. May be called twice."""
        self._group.close()


class TorchSending:
    """A send on its way over NCCL; waiting is done by the stream."""

    def __init__(self, group: ProcessGroup, work: Any, tensor: torch.Tensor) -> None:
        self._group, self._work, self._tensor = group, work, tensor

    def wait(self) -> None:
        """Order what the current stream does next after the send."""
        self._group.wait(self._work)


class TorchLink:
    """A Link over a group of two: member 0 sends, member 1 receives."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    @property
    def num_operations(self) -> int:
        """Hops begun so far."""
        return self._group.num_operations

    def send(self, tensor: torch.Tensor) -> TorchSending:
        """Start to send a contiguous tensor and return at once."""
        return TorchSending(self._group, self._group.send(tensor, 1), tensor)

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor, in the order of the current stream."""
        self._group.receive(tensor, 0)

    def abort(self) -> None:
        """Make both sides leave. Any thread may call it."""
        self._group.abort()

    def close(self) -> None:
        """Give the group back. May be called twice."""
        self._group.close()


def _make_gloo(group: ProcessGroup, store: Any, address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=group.timeout_s)
    # Named by address: by default gloo binds what the host's name resolves to, which may be another interface.
    options._devices = [gloo.create_device(hostname=address, lazy_init=False)]
    return gloo(store, group.member, group.size, options)


def _make_nccl(group: ProcessGroup, store: Any, _address: str) -> Any:
    nccl: Any = dist.ProcessGroupNCCL  # absent from CPU builds of torch
    options = nccl.Options()
    options._timeout = timedelta(seconds=group.timeout_s)
    backend = nccl(store, group.member, group.size, options)
    backend._set_sequence_number_for_group()
    backend.eager_connect_single_device(group.device)
    return backend
