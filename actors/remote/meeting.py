"""The messages between gang and ranks while a gang is assembled: plain data, so that the gang needs no torch."""

from dataclasses import dataclass, field

from actors.decisions.model.plan import Plan
from actors.remote.channel import ChannelAddress
from actors.words.messages import Substitution
from configs.config import Config


@dataclass(frozen=True)
class Assignment:
    """What a rank gets when it starts: config, plan, and where it runs."""

    config: Config
    plan: Plan
    rank: int
    address: str  # of its node; it listens nowhere else
    device: str  # cpu, or cuda:<index>


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one epoch meet."""

    epoch: int
    store_address: str
    store_port: int
    channel: ChannelAddress


@dataclass(frozen=True)
class Loaded:
    """What a rank reports once its weights are loaded."""

    weight_bytes: int
    seconds: float
    substitutions: list[Substitution] = field(default_factory=list)
    fetched_bytes: int = 0


@dataclass(frozen=True)
class RankInfo:
    """What `/cluster` shows of a rank."""

    rank: int
    stage: int
    shard: int
    node: str
    pid: int
    device: str
    layers: tuple[int, int]  # [first, end)
    weight_bytes: int
    heartbeat_age_s: float | None  # None: no heartbeat in this epoch yet
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, since it joined; see PhaseClock
    load_s: float = 0.0  # reading its weights took so long
    fetched_bytes: int = 0  # of them, by this rank, from an object store
    substitutions: list[Substitution] = field(default_factory=list)


def check_substitutions(plan: Plan, loaded: list[Loaded]) -> None:
    """The shards of a stage must compute alike, or their exchanges differ. Raises ValueError where they do not."""
    for shard, load in zip(plan.shards, loaded, strict=True):
        first = loaded[shard.rank - shard.shard]
        own, theirs = ({one.what: one.count for one in each.substitutions} for each in (load, first))
        if differing := sorted(what for what in own.keys() | theirs.keys() if own.get(what) != theirs.get(what)):
            counts = ", ".join(f"{what} {own.get(what)} times, not {theirs.get(what)}" for what in differing)
            raise ValueError(
                f"stage {shard.stage}: shard {shard.shard} substitutes otherwise than shard 0: {counts}; "
                "give the stage devices that are alike, or set substitutions: none (attention over the KV cache stays)"
            )
