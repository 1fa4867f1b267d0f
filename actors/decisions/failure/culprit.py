"""Finds the rank that ended an epoch: the one that is furthest behind, by step, stage and collective."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from actors.decisions.failure.patience import HEARTBEAT_S
from actors.words.errors import Verdict

_STALE_S = 3.2 * HEARTBEAT_S  # beside a step that is overdue, three missed heartbeats are enough to call a rank silent


@dataclass(frozen=True)
class RankProgress:
    """How far a rank has come, as its last heartbeat says."""

    heard: float  # when its last heartbeat came, in monotonic seconds
    step: int = -1  # last step begun
    op: int = 0  # collectives and hops begun; comparable between shards of a stage, which call the same ones


@dataclass(frozen=True)
class Complaint:
    """A rank's report that it cannot go on, or the notice of its death."""

    rank: int
    step: int
    reason: str
    op: int = 0
    is_echo: bool = False  # it cannot go on because a neighbor was lost


def verdict_on_complaints(complaints: Collection[Complaint], num_shards: int) -> Verdict:
    """The culprit among ranks that complain: one that does not complain of a neighbor, else the one furthest behind.

    Ranks that lost a neighbor complain too, and may be a step behind the culprit, where that is of an earlier stage.
    Where all complain of neighbors, the others wait for what the one furthest behind never reached.
    """
    first = min(complaints, key=lambda said: (said.is_echo, said.step, said.rank // num_shards, said.op, said.rank))
    return Verdict("failed", first.reason, (first.rank,), first.step)


def verdict_on_deaths(deaths: Collection[Complaint]) -> Verdict:
    """For processes that ended. Whether from outside, and in which step, is read later from what they left."""
    reasons = "; ".join(dict.fromkeys(death.reason for death in deaths))
    return Verdict("killed", reasons, tuple(sorted({death.rank for death in deaths})))


def verdict_on_silence(progress_by_rank: Mapping[int, RankProgress], now: float, patience_s: float) -> Verdict | None:
    """For ranks that were not heard for `patience_s`; None when all were heard."""
    silent = [rank for rank, progress in progress_by_rank.items() if now - progress.heard > patience_s]
    if not silent:
        return None
    reason = f"nothing is heard from rank {', '.join(map(str, silent))}: dead, stopped or cut off"
    return Verdict("silent", reason, tuple(silent))


def verdict_on_hang(
    step: int | None, progress_by_rank: Mapping[int, RankProgress], num_shards: int, now: float
) -> Verdict:
    """For a step that is overdue (None: a capture). A rank that is not heard either has stopped; else the one furthest
    behind hangs.
    """
    late = "capturing a graph takes too long" if step is None else f"step {step} takes far longer than steps do"
    if silence := verdict_on_silence(progress_by_rank, now, _STALE_S):
        return replace(silence, reason=f"{late}; {silence.reason}")
    behind = min(
        progress_by_rank,
        key=lambda rank: (progress_by_rank[rank].step, rank // num_shards, progress_by_rank[rank].op, rank),
    )
    at = progress_by_rank[behind]
    reason = f"{late}; rank {behind} is furthest behind, at step {at.step}, collective {at.op}"
    return Verdict("hung", reason, (behind,), at.step)


@dataclass(frozen=True)
class CrashReport:
    """What a process that is gone left behind."""

    step: int  # that it was executing; -1: none
    text: str  # empty: it was killed from outside


def revise_verdict(verdict: Verdict, dead: Mapping[int, str], left: Mapping[int, CrashReport]) -> Verdict:
    """The verdict once it is known who is dead (rank → how, in words) and what the processes that are gone left.

    A process that ended by itself is the culprit before any that was killed, and a death before what neighbors said.
    """
    if crashed := [rank for rank in sorted(left) if left[rank].text]:
        rank = min(crashed, key=lambda rank: left[rank].step)
        reason = f"rank {rank} ended itself: {left[rank].text.splitlines()[0]}"
        return Verdict("crashed", reason, (rank,), left[rank].step)
    if dead and verdict.cause != "killed":
        return Verdict("killed", "; ".join(dead.values()), tuple(sorted(dead)))
    if verdict.cause == "silent":
        steps = [left[rank].step for rank in verdict.ranks if rank in left]
        return replace(verdict, step=min((step for step in steps if step >= 0), default=-1))
    return verdict
