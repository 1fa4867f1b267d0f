"""The Executor protocol: who carries out steps (a gang of ranks, or a fake that can be computed by hand)."""

from typing import Protocol

from actors.words.messages import StepBatch, StepResult


class Executor(Protocol):
    """Carries out steps in the order they are submitted. Used by one thread, except `wake`."""

    def submit(self, step: StepBatch) -> None:
        """Send one step and return at once. Raises GangFailure."""

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """Block until results are here, `wake` was called or the time is up; a list in step order, maybe empty.

        Raises GangFailure as soon as a rank is known to be dead or failing.
        """

    def wake(self) -> None:
        """Make `wait` return, now or next time. Any thread may call it."""

    def close(self) -> None:
        """Ask the ranks to leave their loops and release what the channel holds. May be called twice."""
