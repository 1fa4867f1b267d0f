"""The groups of one rank in one epoch: its stage, its links to the neighbour stages, and a control group over all."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.collectives import Link, LoneShard, StageGroup
from cluster.process_group import ProcessGroup, TorchLink, TorchStage
from cluster.rendezvous import EpochStore, pin_nccl
from cluster.shared_memory import SharedMemoryStage, share_memory
from cluster.socket_link import connect_links
from cluster.topology import Topology

logger = logging.getLogger(__name__)


class _Held(Protocol):
    """What a rank must let go of when the epoch ends."""

    def abort(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Groups:
    """What a rank talks through. One thread calls the operations, any thread may call `abort`."""

    stage: StageGroup
    previous: Link | None  # None on the first stage
    next: Link | None  # None on the last stage
    control: ProcessGroup  # every rank, CPU tensors
    held: list[_Held] = field(repr=False)

    def abort(self) -> None:
        """Make every operation of this rank, now or later, end with RuntimeError. Any thread may call it."""
        for group in self.held:
            group.abort()

    def close(self) -> None:
        """Let go of everything, so that the process can join a later epoch. May be called twice."""
        for group in self.held:
            group.close()


def join(
    topology: Topology,
    rank: int,
    store: EpochStore,
    device: torch.device,
    address: str,
    timeout_s: float,
    use_shared_memory: bool = True,
) -> Groups:
    """Meet the other ranks of this epoch and warm every group up.

    `address` is this node's own: nothing listens elsewhere. `timeout_s` is the patience of one collective or one hop;
    that of meeting is the store's. Every rank makes its groups in the same order: control, stage, link from the
    previous stage, link to the next. Raises TimeoutError (which names who is missing), RuntimeError, or JoinCancelled;
    nothing stays open then.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        pin_nccl(address)
    member = _Member(topology, rank, store, device, address, timeout_s)
    held: list[_Held] = []
    with ExitStack() as undo:
        undo.callback(_let_go, held)
        store.roll_call("ranks", rank, topology.num_ranks)
        member.say("all ranks are here")
        control = member.group("control", list(range(topology.num_ranks)), torch.device("cpu"))
        held.append(control)
        member.say("control group connected")
        stage = _join_stage(member, use_shared_memory)
        held.append(stage)
        member.say(f"stage group connected ({type(stage).__name__}, {stage.size} shards)")
        previous, following = _join_links(member, held)
        member.say("links connected")
        _warm_up(member, stage, previous, following)
        control.barrier()
        member.say("all groups work")
        undo.pop_all()
    return Groups(stage, previous, following, control, held)


@dataclass(frozen=True)
class _Member:
    """One rank on its way into an epoch."""

    topology: Topology
    rank: int
    store: EpochStore
    device: torch.device
    address: str
    timeout_s: float

    def group(self, name: str, ranks: list[int], device: torch.device) -> ProcessGroup:
        return ProcessGroup(name, self.store, ranks, self.rank, device, self.address, self.timeout_s)

    def say(self, what: str) -> None:
        logger.info("epoch %d, rank %d of %d: %s", self.store.epoch, self.rank, self.topology.num_ranks, what)


def _join_stage(member: _Member, use_shared_memory: bool) -> StageGroup:
    topology, stage = member.topology, member.topology.stage(member.rank)
    shard, size = topology.shard(member.rank), topology.tensor_parallel_size
    if size == 1:
        return LoneShard()
    if member.device.type == "cpu" and use_shared_memory:
        mapping = share_memory(member.store, stage, size, shard)
        if mapping is not None:
            return SharedMemoryStage(mapping, size, shard, member.timeout_s)
    return TorchStage(member.group(f"stage{stage}", topology.stage_ranks(stage), member.device))


def _join_links(member: _Member, held: list[_Held]) -> tuple[Link | None, Link | None]:
    """(from the previous stage, to the next stage); what was made goes to `held` at once."""
    topology, rank = member.topology, member.rank
    before = None if topology.is_first_stage(rank) else topology.previous_rank(rank)
    after = None if topology.is_last_stage(rank) else topology.next_rank(rank)
    if member.device.type == "cpu":
        links = connect_links(member.store, rank, before, after, member.address, member.timeout_s)
        held.extend(link for link in links if link is not None)
        return links

    def link_between(sender: int | None, receiver: int | None) -> Link | None:
        if sender is None or receiver is None:
            return None
        link = TorchLink(member.group(f"link{sender}to{receiver}", [sender, receiver], member.device))
        held.append(link)
        return link

    # The first stage starts with its only link, so the ranks of a pipeline complete their groups one after the other.
    return link_between(before, rank), link_between(rank, after)


def _warm_up(member: _Member, stage: StageGroup, previous: Link | None, following: Link | None) -> None:
    """One small operation on each group: what is broken shows now, and the first request finds everything connected."""
    rank = member.rank
    total = stage.all_reduce(torch.ones(1, device=member.device))
    came_from = rank if previous is None else member.topology.previous_rank(rank)
    heard = torch.full((1,), float(rank), device=member.device)
    if previous is not None:
        previous.receive(heard)
    if following is not None:
        following.send(torch.full((1,), float(rank), device=member.device)).wait()
    if total.item() != stage.size or heard.item() != came_from:
        raise RuntimeError(
            f"rank {rank}: warm-up gave a sum of {total.item():g} for {stage.size} shards, "
            f"and a hop from {heard.item():g} instead of rank {came_from}"
        )


def _let_go(held: Iterable[_Held]) -> None:
    for group in held:
        group.abort()
        group.close()
