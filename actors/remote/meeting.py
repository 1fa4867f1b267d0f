"""What gang and rank tell each other while a gang comes together; plain data, so that the gang needs no torch."""

from dataclasses import dataclass, field

from actors.decisions.model.plan import Plan
from actors.remote.channel import ChannelAddress
from actors.words.messages import Substitution
from configs.config import Config


@dataclass(frozen=True)
class Assignment:
    """What a rank is told when it starts."""

    config: Config
    plan: Plan
    rank: int
    address: str  # of its node, for everything that it binds
    device: str  # cpu, or cuda:<index>


@dataclass(frozen=True)
class Meeting:
    """Where a gang of one epoch comes together."""

    epoch: int
    store_address: str
    store_port: int
    channel: ChannelAddress


@dataclass(frozen=True)
class Loaded:
    """What a rank says once its weights are there."""

    weight_bytes: int
    seconds: float
    num_blocks_that_fit: int
    substitutions: list[Substitution] = field(default_factory=list)


@dataclass(frozen=True)
class RankInfo:
    """What `/cluster` says of a rank."""

    rank: int
    stage: int
    shard: int
    node: str
    pid: int
    device: str
    layers: tuple[int, int]  # [first, end)
    weight_bytes: int
    heartbeat_age_s: float | None  # None: not heard in this epoch yet
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, since it joined; see PhaseClock
    load_s: float = 0.0  # that reading its weights took
    substitutions: list[Substitution] = field(default_factory=list)
