"""What came of calls to ranks: their results, and in words how ranks died or failed."""

from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.words.errors import GangFailure


def result_of(ref: Any, rank: int) -> Any:
    """Wait for the result of a call to a rank. Raises GangFailure, or a ValueError of the rank as it is."""
    try:
        return ray.get(ref)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError):
            raise cause from None  # the user can fix it: raise the rank's own error
        raise GangFailure(in_words(error, rank)) from error


def end_of_loop(ref: Any, rank: int) -> tuple[bool, str]:
    """(Whether the rank's process died, how its loop ended in words)."""
    try:
        said: str | None = ray.get(ref)
    except RayError as error:
        return isinstance(error, RayActorError), in_words(error, rank)
    return False, f"rank {rank} failed: {said}" if said else f"rank {rank} left its loop"


def in_words(error: RayError, rank: int) -> str:
    """How a rank died or failed."""
    if isinstance(error, RayActorError):
        return f"rank {rank} died: {str(error).partition(chr(10))[0]}"
    cause = getattr(error, "cause", None)
    return f"rank {rank} failed: {type(cause).__name__}: {cause}" if cause else f"rank {rank} failed: {error}"
