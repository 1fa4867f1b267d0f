"""The transport of CUDA tensors: NCCL for stages and links, and symmetric memory for a stage's small sums."""

from contextlib import ExitStack
from typing import Any

import torch

from cluster.collectives.interface import StageGroup
from cluster.collectives.process_group import NcclGroup, TorchStage
from cluster.collectives.symmetric_memory import with_symmetric_memory
from cluster.collectives.transport import Member


class CUDATransport:
    """Connects ranks whose tensors are on a CUDA device each; see Transport."""

    def __init__(self, member: Member) -> None:
        self._member = member
        torch.cuda.set_device(member.device)

    def join_stage(self) -> StageGroup:
        """See Transport."""
        member = self._member
        stage = member.topology.stage(member.rank)
        group = TorchStage(self._group(f"stage{stage}", member.topology.stage_ranks(stage)))
        return with_symmetric_memory(group, member.store, stage, member.device)

    def connect(self, name: str, before: int | None, after: int | None) -> tuple["NcclLink | None", "NcclLink | None"]:
        """See Transport."""
        rank = self._member.rank
        with ExitStack() as undo:
            link_in = None if before is None else NcclLink(self._group(f"{name}{before}to{rank}", [before, rank]))
            if link_in is not None:
                undo.callback(link_in.close)
                undo.callback(link_in.abort)
            link_out = None if after is None else NcclLink(self._group(f"{name}{rank}to{after}", [rank, after]))
            undo.pop_all()
        return link_in, link_out

    def _group(self, name: str, ranks: list[int]) -> NcclGroup:
        member = self._member
        return NcclGroup(name, member.store, ranks, member.rank, member.device, member.timeout_s)


class NcclSending:
    """A send that has begun over NCCL; the stream waits for it, not the host."""

    def __init__(self, group: NcclGroup, work: Any, tensor: torch.Tensor) -> None:
        self._group, self._work, self._tensor = group, work, tensor

    def wait(self) -> None:
        """Make the current stream wait for the send."""
        self._group.wait(self._work)


class NcclLink:
    """A Link over a group of two: member 0 sends, member 1 receives."""

    def __init__(self, group: NcclGroup) -> None:
        self._group = group

    @property
    def num_operations(self) -> int:
        """Hops begun so far."""
        return self._group.num_operations

    def send(self, tensor: torch.Tensor) -> NcclSending:
        """Start to send a contiguous tensor and return at once."""
        return NcclSending(self._group, self._group.send(tensor, 1), tensor)

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor, in the order of the current stream."""
        self._group.receive(tensor, 0)

    def abort(self) -> None:
        """Make operations on both sides raise RuntimeError. Any thread may call it."""
        self._group.abort()

    def close(self) -> None:
        """Give the group back. May be called twice."""
        self._group.close()
