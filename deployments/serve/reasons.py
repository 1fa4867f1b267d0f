"""Finds, in the tracebacks that Serve reports, the words that people need."""

import os
import re
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[2]
ROOMS = tuple(str(HOUSE / room) + os.sep for room in ("configs", "cluster", "actors", "deployments"))
# A replica whose start fails with one of these fails again with the same words: no use in Serve's further tries.
FINAL_ERRORS = ("ValueError", "CheckpointError", "UnsupportedModel", "InfeasiblePlacement")


def for_people(text: str) -> str:
    """Our own exception's message without the traceback around it; any other text whole, as somebody must debug it."""
    own = _own_error(text)
    return own[1] if own else text.strip()


def is_final(text: str) -> bool:
    """Whether the error in the text is one of ours that another try would meet again."""
    own = _own_error(text)
    return own is not None and own[0] in FINAL_ERRORS


def _own_error(text: str) -> tuple[str, str] | None:
    """(class name, message) of the last exception in the text, when its innermost frame is in this house."""
    frames = list(re.finditer(r'^ +File "(.+?)", line .*\n', text, re.MULTILINE))
    if not frames or not frames[-1][1].startswith(ROOMS):
        return None
    raised = re.search(r"^(?:\w+\.)*(\w+): ((?:.|\n)*)", text[frames[-1].end() :], re.MULTILINE)
    return (raised[1], raised[2].strip()) if raised else None
