"""Who ended an epoch: of those who could have, the rank that is furthest behind, by step, stage and collective."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from actors.decisions.failure.patience import HEARTBEAT_S
from actors.words.errors import Verdict

_STALE_S = 3.2 * HEARTBEAT_S  # beside a step that is overdue, three missed heartbeats are enough to call a rank silent


@dataclass(frozen=True)
class RankProgress:
    """How far a rank has come, in its own words."""

    heard: float  # monotonic seconds
    step: int = -1  # last step begun
    op: int = 0  # collectives and hops begun; comparable between shards of a stage, which call the same ones


@dataclass(frozen=True)
class Complaint:
    """A rank's own word that it cannot go on, or the notice of its death."""

    rank: int
    step: int
    reason: str
    op: int = 0
    is_echo: bool = False  # about a neighbour


def of_complaints(complaints: Collection[Complaint], num_shards: int) -> Verdict:
    """Whoever lost a neighbour complains too, and may be a step behind the culprit, where that is of an earlier stage.

    Where nobody says more than that, the one furthest behind: the others wait for what it never reached.
    """
    first = min(complaints, key=lambda said: (said.is_echo, said.step, said.rank // num_shards, said.op, said.rank))
    return Verdict("failed", first.reason, (first.rank,), first.step)


def of_deaths(deaths: Collection[Complaint]) -> Verdict:
    """Processes that ended. Whether from outside, and in which step, shows what they left behind."""
    reasons = "; ".join(dict.fromkeys(death.reason for death in deaths))
    return Verdict("killed", reasons, tuple(sorted({death.rank for death in deaths})))


def of_silence(progress_by_rank: Mapping[int, RankProgress], now: float, patience_s: float) -> Verdict | None:
    """Ranks that have said nothing for too long; None when all were heard."""
    silent = [rank for rank, progress in progress_by_rank.items() if now - progress.heard > patience_s]
    if not silent:
        return None
    words = f"nothing is heard from rank {', '.join(map(str, silent))}: dead, stopped or cut off"
    return Verdict("silent", words, tuple(silent))


def of_hang(step: int, progress_by_rank: Mapping[int, RankProgress], num_shards: int, now: float) -> Verdict:
    """A step takes far too long: a rank that is not heard either has stopped; else the one furthest behind hangs."""
    late = f"step {step} takes far longer than steps do"
    if silence := of_silence(progress_by_rank, now, _STALE_S):
        return replace(silence, reason=f"{late}; {silence.reason}")
    behind = min(
        progress_by_rank,
        key=lambda rank: (progress_by_rank[rank].step, rank // num_shards, progress_by_rank[rank].op, rank),
    )
    at = progress_by_rank[behind]
    words = f"{late}; rank {behind} is furthest behind, at step {at.step}, collective {at.op}"
    return Verdict("hung", words, (behind,), at.step)


@dataclass(frozen=True)
class CrashReport:
    """What a process left that is gone."""

    step: int  # that it was executing; -1: none
    text: str  # empty: it was killed from outside


def revise_verdict(verdict: Verdict, dead: Mapping[int, str], left: Mapping[int, CrashReport]) -> Verdict:
    """What is known once the dead are found (rank → in words) and what was left by those that are gone is read.

    A death outranks what neighbours said of it; whoever ended itself outranks whoever was killed.
    """
    if crashed := [rank for rank in sorted(left) if left[rank].text]:
        rank = min(crashed, key=lambda rank: left[rank].step)
        words = f"rank {rank} ended itself: {left[rank].text.splitlines()[0]}"
        return Verdict("crashed", words, (rank,), left[rank].step)
    if dead and verdict.cause != "killed":
        return Verdict("killed", "; ".join(dead.values()), tuple(sorted(dead)))
    if verdict.cause == "silent":
        steps = [left[rank].step for rank in verdict.ranks if rank in left]
        return replace(verdict, step=min((step for step in steps if step >= 0), default=-1))
    return verdict
