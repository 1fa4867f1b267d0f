"""What a rank exchanges tensors with, by the kind of its device: the interface that each kind implements."""

from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.collectives.interface import Link, StageGroup
from cluster.collectives.rendezvous import EpochStore
from cluster.topology import Topology


@dataclass(frozen=True)
class Member:
    """One rank on its way into an epoch."""

    topology: Topology
    rank: int
    store: EpochStore
    device: torch.device
    address: str  # of its node: nothing listens elsewhere
    timeout_s: float  # the time limit of one collective or one hop


class Held(Protocol):
    """What a rank must release when the epoch ends."""

    @property
    def num_operations(self) -> int:
        """Operations begun so far. Any thread may ask."""

    def abort(self) -> None:
        """Make every operation, now and later, raise RuntimeError. Any thread may call it."""

    def close(self) -> None:
        """Release what is held. May be called twice."""


class HeldLink(Link, Held, Protocol):
    """A link that a rank releases when the epoch ends."""


class Transport(Protocol):
    """How one rank connects to others in one epoch. Every rank of the epoch makes the same calls in the same order."""

    def __init__(self, member: Member) -> None:
        """Prepare the calling thread for the member's device."""

    def join_stage(self) -> StageGroup:
        """Meet the other shards of this rank's stage, of which there is at least one.

        Raises TimeoutError, RuntimeError, or JoinCancelled.
        """

    def connect(self, name: str, before: int | None, after: int | None) -> tuple[HeldLink | None, HeldLink | None]:
        """Make (the link from rank `before`, the link to rank `after`), None where there is no such rank.

        `name` tells kinds of links between the same ranks apart. Raises as `join_stage`; nothing stays open then.
        """
