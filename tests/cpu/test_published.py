"""Configs of published checkpoints: each plans with the right numbers, or is refused for all that stands against it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deployments import cli

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("specs_are_read_once")]

PUBLISHED = Path(__file__).resolve().parents[1] / "data" / "published"


class Planned(NamedTuple):
    """What a plan says of a model: its parameters, and the bytes of a token in the KV cache."""

    parameters: int
    kv_bytes_per_token: int
    dtype: str = "bfloat16"


class Refused(NamedTuple):
    """Parts of the reasons, one a line, in order."""

    reasons: tuple[str, ...]


FP8, NVFP4, MXFP4 = (f"weights are quantized: {method} (" for method in ("FP8", "NVFP4", "MXFP4"))
STATES = "keeps the states of "
INDEXER = "attends to tokens that a sparse indexer chooses"
VERDICTS: dict[str, Planned | Refused] = {}

# One of each kind of verdict
ALWAYS: tuple[str, ...] = ()
EACH = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.soak) for name in sorted(VERDICTS)]


def plan(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    cli.main(["plan", str(folder), "--json", *flags])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def verdict(said: dict[str, Any]) -> Planned | Refused:
    if "parameters" in said:
        return Planned(said["parameters"], said["kv_bytes_per_token"], said["dtype"])
    return Refused(tuple(said["problems"]))
