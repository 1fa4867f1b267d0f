"""A finding: what was checked where, the verdict, and the remedy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Judgement = Literal["ok", "warn", "fail", "not checked"]
JUDGEMENTS: tuple[Judgement, ...] = ("fail", "warn", "not checked", "ok")  # the worst first


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    where: str  # a node's name, two of them, or `cluster`
    judgement: Judgement
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.judgement == "ok", f"{self.check}: without a remedy: {self.found}"


def ok(check: str, where: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, where, "ok", found)


def warn(check: str, where: str, found: str, remedy: str) -> Finding:
    """Serving works, slower or less safely than it could."""
    return Finding(check, where, "warn", found, remedy)


def fail(check: str, where: str, found: str, remedy: str) -> Finding:
    """Serving will not start, or will break."""
    return Finding(check, where, "fail", found, remedy)


def not_checked(check: str, where: str, found: str, remedy: str) -> Finding:
    """It could not be looked at; `found` says why."""
    return Finding(check, where, "not checked", found, remedy)


def worst(findings: Sequence[Finding]) -> Judgement:
    """The verdict over all."""
    return min((finding.judgement for finding in findings), key=JUDGEMENTS.index, default="ok")
