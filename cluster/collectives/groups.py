"""The groups of one rank in one epoch: its stage, its links to the neighbour stages, and a control group over all."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.collectives.interface import Link, LoneShard, StageGroup
from cluster.collectives.process_group import ProcessGroup, TorchLink, TorchStage
from cluster.collectives.rendezvous import EpochStore, pin_nccl
from cluster.collectives.shared_memory import SharedMemoryStage, share_memory
from cluster.collectives.socket_link import connect_links
from cluster.collectives.symmetric_memory import with_symmetric_memory
from cluster.topology import Topology

logger = logging.getLogger(__name__)


class _Held(Protocol):
    """What a rank must let go of when the epoch ends."""

    @property
    def num_operations(self) -> int: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Groups:
    """What a rank talks through. One thread calls the operations, any thread may call `abort`."""

    stage: StageGroup
    previous: Link | None  # None on the first stage
    next: Link | None  # None on the last stage
    feedback: Link | None  # what the last stage sampled, to the same shard of the first; None on the others, and alone
    control: ProcessGroup  # every rank, CPU tensors
    held: list[_Held] = field(repr=False)

    @property
    def num_operations(self) -> int:
        """Collectives and hops begun so far; shards of a stage begin the same ones. Any thread may ask."""
        return sum(group.num_operations for group in self.held)

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
    previous stage, link to the next, feedback. Raises TimeoutError (which names who is missing), RuntimeError, or
    JoinCancelled; nothing stays open then.
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
        links = _join_links(member, held)
        member.say("links connected")
        _warm_up(member, stage, *links)
        control.barrier()
        member.say("all groups work")
        undo.pop_all()
    return Groups(stage, *links, control, held)


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
    group = TorchStage(member.group(f"stage{stage}", topology.stage_ranks(stage), member.device))
    if member.device.type == "cuda":
        return with_symmetric_memory(group, member.store, stage, member.device)
    return group


def _join_links(member: _Member, held: list[_Held]) -> tuple[Link | None, Link | None, Link | None]:
    """(from the previous stage, to the next stage, feedback); what was made goes to `held` at once."""
    topology, rank = member.topology, member.rank
    is_first, is_last = topology.is_first_stage(rank), topology.is_last_stage(rank)
    before = None if is_first else topology.previous_rank(rank)
    after = None if is_last else topology.next_rank(rank)
    # The first stage starts with its only link, so the ranks of a pipeline complete their groups one after the other;
    # feedback closes the circle only once that line is complete.
    previous, following = _connect(member, "link", before, after, held)
    if is_first == is_last:
        return previous, following, None
    shard = topology.shard(rank)
    last = topology.rank(topology.pipeline_parallel_size - 1, shard) if is_first else None
    first = topology.rank(0, shard) if is_last else None
    from_last, to_first = _connect(member, "feedback", last, first, held)
    return previous, following, from_last or to_first


def _connect(
    member: _Member, name: str, before: int | None, after: int | None, held: list[_Held]
) -> tuple[Link | None, Link | None]:
    """(link from rank `before`, link to rank `after`)."""
    rank = member.rank
    if member.device.type == "cpu":
        links = connect_links(member.store, rank, before, after, member.address, member.timeout_s, name)
        held.extend(link for link in links if link is not None)
        return links

    def link_between(sender: int | None, receiver: int | None) -> Link | None:
        if sender is None or receiver is None:
            return None
        link = TorchLink(member.group(f"{name}{sender}to{receiver}", [sender, receiver], member.device))
        held.append(link)
        return link

    return link_between(before, rank), link_between(rank, after)


def _warm_up(
    member: _Member, stage: StageGroup, previous: Link | None, following: Link | None, feedback: Link | None
) -> None:
    """One small operation on each group: what is broken shows now, and the first request finds everything connected."""
    topology, rank, own = member.topology, member.rank, torch.full((1,), float(member.rank), device=member.device)
    total = stage.all_reduce(torch.ones(1, device=member.device))
    heard, expected = own.clone(), rank
    returned, returning = own.clone(), rank
    if previous is not None:
        previous.receive(heard)
        expected = topology.previous_rank(rank)
    if following is not None:
        following.send(own).wait()
    if feedback is not None and topology.is_last_stage(rank):
        feedback.send(own).wait()
    elif feedback is not None:
        feedback.receive(returned)
        returning = topology.rank(topology.pipeline_parallel_size - 1, topology.shard(rank))
    if total.item() != stage.size or heard.item() != expected or returned.item() != returning:
        raise RuntimeError(
            f"rank {rank}: warm-up gave a sum of {total.item():g} for {stage.size} shards, a hop from {heard.item():g} "
            f"instead of rank {expected}, and feedback from {returned.item():g} instead of rank {returning}"
        )


def _let_go(held: Iterable[_Held]) -> None:
    for group in held:
        group.abort()
        group.close()
