"""The errors that cross rooms: each says who is at fault and what to do next."""

import dataclasses
from typing import Literal

# killed: from outside · crashed: its process ended by itself · failed: it raised · hung: it stayed in a step ·
# silent: stopped or cut off · accounting: our own account does not add up
Cause = Literal["killed", "crashed", "failed", "hung", "silent", "accounting"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why an epoch ended, and who ended it."""

    cause: Cause
    reason: str  # in words for people
    ranks: tuple[int, ...] = ()  # the culprits; nobody: it is not known, or no rank's fault
    step: int = -1  # that the culprit was in; -1: in none, or it is not known

    @property
    def is_from_within(self) -> bool:
        """Whether what was computed may have brought it about; a kill or a lost node is nobody's fault.

        Who falls silent in a step was stopped, or hangs with the interpreter's lock: that cannot be told apart.
        """
        return self.cause in ("crashed", "failed", "hung") or (self.cause == "silent" and self.step >= 0)


class GangFailure(RuntimeError):
    """A rank died, failed or fell silent: no step of this epoch will end. Handled by the engine."""

    def __init__(self, reason: str, verdict: Verdict | None = None) -> None:
        """Without a verdict nothing more is known than the words."""
        super().__init__(reason)
        self.verdict = verdict or Verdict("killed", reason)


class GangLost(GangFailure):
    """The gang cannot come back, however often it is tried. Handled by the engine: it gives up."""


class IntegrityError(RuntimeError):
    """Our own accounting does not add up; the message has the numbers. Handled by the engine: it begins anew."""


class EngineStopped(RuntimeError):
    """The engine takes no request any more. Handled at the HTTP edge: 503."""


class CheckpointError(ValueError):
    """A checkpoint cannot be served as it is: names the file and the tensor. Handled at start-up."""


class UnsupportedModel(ValueError):
    """A model that cannot be served correctly: names the family and the reason. Handled at start-up."""
