"""The groups of one rank in one epoch: its stage, its links to the neighbour stages, and a control group over all."""

import logging
from collections.abc import Callable, Iterable
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
    that of meeting is the store's. Every rank makes its groups in the same order: control, stage, links, and in links
    a rank opens its door before it knocks. Raises TimeoutError (which names who is missing), RuntimeError, or
    JoinCancelled; nothing stays open then.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        pin_nccl(address)
    held: list[_Held] = []
    with ExitStack() as undo:
        undo.callback(_let_go, held)
        say = _progress(rank, topology.num_ranks, store.epoch)
        store.roll_call("ranks", rank, topology.num_ranks)
        say("all ranks are here")
        everybody = list(range(topology.num_ranks))
        control = ProcessGroup("control", store, everybody, rank, torch.device("cpu"), address, timeout_s)
        held.append(control)
        say("control group connected")
        stage = _join_stage(topology, rank, store, device, address, timeout_s, use_shared_memory)
        held.append(stage)
        say(f"stage group connected ({type(stage).__name__}, {stage.size} shards)")
        previous, following = _join_links(topology, rank, store, device, address, timeout_s, held)
        say("links connected")
        _warm_up(topology, rank, stage, previous, following, control, device)
        say("all groups work")
        undo.pop_all()
    return Groups(stage, previous, following, control, held)


def _join_stage(
    topology: Topology,
    rank: int,
    store: EpochStore,
    device: torch.device,
    address: str,
    timeout_s: float,
    use_shared_memory: bool,
) -> StageGroup:
    stage, shard, size = topology.stage(rank), topology.shard(rank), topology.tensor_parallel_size
    if size == 1:
        return LoneShard()
    if device.type == "cpu" and use_shared_memory:
        mapping = share_memory(store, stage, size, shard)
        if mapping is not None:
            return SharedMemoryStage(mapping, size, shard, timeout_s)
    members = topology.stage_ranks(stage)
    return TorchStage(ProcessGroup(f"stage{stage}", store, members, rank, device, address, timeout_s))


def _join_links(
    topology: Topology,
    rank: int,
    store: EpochStore,
    device: torch.device,
    address: str,
    timeout_s: float,
    held: list[_Held],
) -> tuple[Link | None, Link | None]:
    """(from the previous stage, to the next stage); what was made goes to `held` at once."""
    before = None if topology.is_first_stage(rank) else topology.previous_rank(rank)
    after = None if topology.is_last_stage(rank) else topology.next_rank(rank)
    if device.type == "cpu":
        link_in, link_out = connect_links(store, rank, before, after, address, timeout_s)
        held.extend(link for link in (link_in, link_out) if link is not None)
        return link_in, link_out
    made: list[TorchLink | None] = []
    # From the first stage on: the group with the previous stage is complete before the one with the next begins.
    for pair in ([before, rank] if before is not None else None, [rank, after] if after is not None else None):
        link = None
        if pair is not None:
            members = [member for member in pair if member is not None]
            name = f"link{members[0]}to{members[1]}"
            link = TorchLink(ProcessGroup(name, store, members, rank, device, address, timeout_s))
            held.append(link)
        made.append(link)
    return made[0], made[1]


def _warm_up(
    topology: Topology,
    rank: int,
    stage: StageGroup,
    previous: Link | None,
    following: Link | None,
    control: ProcessGroup,
    device: torch.device,
) -> None:
    """One small operation on each group: what is broken shows now, and the first request finds everything connected."""
    total = stage.all_reduce(torch.ones(1, device=device))
    hop = torch.full((1,), float(rank), device=device)
    if previous is not None:
        previous.receive(hop)
    sending = None
    if following is not None:
        sending = following.send(torch.full((1,), float(rank), device=device))
    if sending is not None:
        sending.wait()
    came_from = rank if previous is None else topology.previous_rank(rank)
    if total.item() != stage.size or hop.item() != came_from:
        raise RuntimeError(
            f"rank {rank}: warm-up gave a sum of {total.item():g} for {stage.size} shards, "
            f"and a hop from {hop.item():g} instead of rank {came_from}"
        )
    control.barrier()


def _let_go(held: Iterable[_Held]) -> None:
    for group in held:
        group.abort()
        group.close()


def _progress(rank: int, num_ranks: int, epoch: int) -> Callable[[str], None]:
    def say(what: str) -> None:
        logger.info("epoch %d, rank %d of %d: %s", epoch, rank, num_ranks, what)

    return say
