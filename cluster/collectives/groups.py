"""The groups of one rank in one epoch: its stage, its links to the neighbor stages, and a control group over all."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from cluster.collectives.cpu_transport import CPUTransport
from cluster.collectives.cuda_transport import CUDATransport
from cluster.collectives.interface import Link, LoneShard, StageGroup
from cluster.collectives.process_group import GlooGroup
from cluster.collectives.rendezvous import EpochStore
from cluster.collectives.transport import Held, Member, Transport
from cluster.topology import Topology

logger = logging.getLogger(__name__)


# By the type of a torch device. A backend whose tensors are on the CPU uses the CPU's, whatever computes them.
_TRANSPORTS: dict[str, type[Transport]] = {"cpu": CPUTransport, "cuda": CUDATransport}


@dataclass
class Groups:
    """All groups of a rank. One thread calls the operations, any thread may call `abort`."""

    stage: StageGroup
    previous: Link | None  # None on the first stage
    next: Link | None  # None on the last stage
    feedback: Link | None  # sampled ids, from the last stage to the same shard of the first; None on other stages
    control: GlooGroup  # every rank, CPU tensors
    held: list[Held] = field(repr=False)

    @property
    def num_operations(self) -> int:
        """Collectives and hops begun so far; all shards of a stage begin the same ones. Any thread may ask."""
        return sum(group.num_operations for group in self.held)

    def abort(self) -> None:
        """Make every operation of this rank, now and later, raise RuntimeError. Any thread may call it."""
        for group in self.held:
            group.abort()

    def close(self) -> None:
        """Release everything, so that the process can join a later epoch. May be called twice."""
        for group in self.held:
            group.close()


def join(
    topology: Topology, rank: int, store: EpochStore, device: torch.device, address: str, timeout_s: float
) -> Groups:
    """Meet the other ranks of this epoch, make all groups, and warm them up.

    `address` is this node's own: nothing listens elsewhere. `timeout_s` is the time limit of one collective or one hop;
    that of meeting is the store's. Every rank makes its groups in the same order: control, stage, link from the
    previous stage, link to the next, feedback. Raises TimeoutError (which names who is missing), RuntimeError, or
    JoinCancelled; nothing stays open then.
    """
    member = Member(topology, rank, store, device, address, timeout_s)
    if device.type not in _TRANSPORTS:
        raise ValueError(f"ranks exchange tensors on {' and '.join(_TRANSPORTS)} only, not on {device}")
    transport = _TRANSPORTS[device.type](member)
    held: list[Held] = []
    with ExitStack() as undo:
        undo.callback(_let_go, held)
        store.roll_call("ranks", rank, topology.num_ranks)
        _say(member, "all ranks are here")
        control = GlooGroup("control", store, list(range(topology.num_ranks)), rank, address, timeout_s)
        held.append(control)
        _say(member, "control group connected")
        stage = LoneShard() if topology.tensor_parallel_size == 1 else transport.join_stage()
        held.append(stage)
        _say(member, f"stage group connected ({type(stage).__name__}, {stage.size} shards)")
        links = _join_links(member, transport, held)
        _say(member, "links connected")
        _warm_up(member, stage, *links)
        control.barrier()
        _say(member, "all groups work")
        undo.pop_all()
    return Groups(stage, *links, control, held)


def _join_links(member: Member, transport: Transport, held: list[Held]) -> tuple[Link | None, Link | None, Link | None]:
    """(Link from the previous stage, link to the next stage, feedback); each is added to `held` when it is made."""
    topology, rank = member.topology, member.rank
    is_first, is_last = topology.is_first_stage(rank), topology.is_last_stage(rank)
    before = None if is_first else topology.previous_rank(rank)
    after = None if is_last else topology.next_rank(rank)
    # The first stage starts with its only link, so the ranks of a pipeline complete their groups one after the other;
    # feedback closes the circle only once that line is complete.
    previous, following = transport.connect("link", before, after)
    held.extend(link for link in (previous, following) if link is not None)
    if is_first == is_last:
        return previous, following, None
    shard = topology.shard(rank)
    last = topology.rank(topology.pipeline_parallel_size - 1, shard) if is_first else None
    first = topology.rank(0, shard) if is_last else None
    feedback = next(link for link in transport.connect("feedback", last, first) if link is not None)
    held.append(feedback)
    return previous, following, feedback


def _warm_up(
    member: Member, stage: StageGroup, previous: Link | None, following: Link | None, feedback: Link | None
) -> None:
    """Run one small operation on each group: a fault shows now, and the first request finds everything connected."""
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


def _say(member: Member, what: str) -> None:
    logger.info("epoch %d, rank %d of %d: %s", member.store.epoch, member.rank, member.topology.num_ranks, what)


def _let_go(held: Iterable[Held]) -> None:
    for group in held:
        group.abort()
        group.close()
