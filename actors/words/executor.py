"""The Executor protocol: what carries out steps (a gang of ranks, or a test's fake), and how a lost one comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.words.errors import Verdict
from actors.words.messages import Bucket, Captured, StepBatch, StepResult


class Executor(Protocol):
    """Carries out steps in the order they are submitted. Used by one thread, except `wake`."""

    shapes: Sequence[Bucket]  # of steps that its ranks can capture in graphs; none where their device has no graphs

    def submit(self, step: StepBatch) -> None:
        """Send one step and return at once. Raises GangFailure."""

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """Block until results are here, `wake` was called or the time is up; a list in step order, maybe empty.

        Raises GangFailure as soon as a rank is known to be dead or failing.
        """

    def check(self) -> None:
        """Ask all ranks, between two steps, whether their weights are numbers. Raises GangFailure, now or later."""

    def capture(self, bucket: Bucket) -> None:
        """Let all ranks capture a shape, between two steps; one at a time. Raises GangFailure, now or later."""

    def take_captured(self) -> list[Captured]:
        """How captures ended, since the last call; `wait` returns when one did."""

    def wake(self) -> None:
        """Make `wait` return, now or next time. Any thread may call it."""

    def close(self) -> None:
        """Ask the ranks to leave their loops and release what the channel holds. May be called twice."""


@dataclass(frozen=True)
class Revival:
    """An executor of a new epoch, and what was found out about the end of the one before."""

    executor: Executor
    verdict: Verdict
    seconds: dict[str, float] = field(default_factory=dict)  # of recovery, by phase


# (epoch, why the last one ended, whether all ranks start anew) → the new executor; raises GangFailure.
Revive = Callable[[int, Verdict, bool], Revival]
