"""The errors that cross rooms, each with where it is handled, and the verdict on a lost epoch."""

import dataclasses
from typing import Literal

# killed: from outside · crashed: its process ended by itself · failed: it raised · hung: it stayed in a step ·
# silent: stopped or cut off · accounting: the engine's own counts do not add up
Cause = Literal["killed", "crashed", "failed", "hung", "silent", "accounting"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why an epoch ended, and who ended it."""

    cause: Cause
    reason: str  # in words for people
    ranks: tuple[int, ...] = ()  # the culprits; none: unknown, or no rank's fault
    step: int = -1  # that the culprit was in; -1: none, or unknown

    @property
    def is_from_within(self) -> bool:
        """Whether what was computed may be the cause. A kill or a lost node is not.

        A rank that falls silent in a step was stopped, or hangs with the interpreter's lock: nobody can tell which.
        """
        return self.cause in ("crashed", "failed", "hung") or (self.cause == "silent" and self.step >= 0)


class GangFailure(RuntimeError):
    """A rank died, failed or fell silent: no step of this epoch will end. Handled by the engine."""

    def __init__(self, reason: str, verdict: Verdict | None = None) -> None:
        """`verdict` is None where nothing is known but the reason."""
        super().__init__(reason)
        self.verdict = verdict or Verdict("killed", reason)


class GangLost(GangFailure):
    """The gang cannot come back, and trying again would not help. Handled by the engine: it gives up."""


class IntegrityError(RuntimeError):
    """The engine's own counts do not add up; the message has the numbers. Handled by the engine: a new epoch."""


class EngineStopped(RuntimeError):
    """The engine takes no more requests. Handled at the HTTP edge: 503."""


class CheckpointError(ValueError):
    """A checkpoint cannot be served as it is: names the file and the tensor. Handled at start-up."""


class UnsupportedModel(ValueError):
    """A model that cannot be served correctly: names the family and the reason. Handled at start-up."""
