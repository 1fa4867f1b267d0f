"""Finds our own error messages in the tracebacks that Serve reports."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(str(ROOT / package) + os.sep for package in ("configs", "cluster", "actors", "deployments"))
# A replica whose start fails with one of these would fail again with the same message: Serve's retries are useless.
FINAL_ERRORS = ("ValueError", "CheckpointError", "UnsupportedModel", "InfeasiblePlacement")


def for_people(text: str) -> str:
    """The message alone where the exception is one of ours; any other text whole, as it has to be debugged."""
    own = _own_error(text)
    return own[1] if own else text.strip()


def is_final(text: str) -> bool:
    """Whether the error in the text is one of ours that another try would meet again."""
    own = _own_error(text)
    return own is not None and own[0] in FINAL_ERRORS


def _own_error(text: str) -> tuple[str, str] | None:
    """(class name, message) of the last exception in the text, when its innermost frame is in our packages."""
    frames = list(re.finditer(r'^ +File "(.+?)", line .*\n', text, re.MULTILINE))
    if not frames or not frames[-1][1].startswith(PACKAGES):
        return None
    raised = re.search(r"^(?:\w+\.)*(\w+): ((?:.|\n)*)", text[frames[-1].end() :], re.MULTILINE)
    return (raised[1], raised[2].strip()) if raised else None
