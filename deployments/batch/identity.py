"""What a job is known by: fingerprints of its input and config, and every id, seed and date that follows from them."""

import hashlib
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import msgspec

from configs.config import Config

_SEED_MASK = 2**63 - 1
# Groups of keys that change where and how fast a job runs, and none of its answers
_NOT_OF_THE_ANSWERS: Any = dict.fromkeys(
    ("placement", "timeouts", "recovery", "scheduler", "batch", "network", "monitoring", "api"), True
) | {"model": {"cache_folder"}}
_READ_WHOLE_BELOW = 64 << 20  # bytes of a checkpoint's file; of larger ones, which are weights, the size counts


class Identity:
    """The fingerprints of a job, and what follows from them for each row: the same in every run."""

    def __init__(self, input_sha256: str, config_sha256: str, day: date) -> None:
        self.input_sha256, self.config_sha256, self.day = input_sha256, config_sha256, day
        self.fingerprint = hashlib.sha256(f"{input_sha256} {config_sha256}".encode()).hexdigest()

    @property
    def now(self) -> datetime:
        """The time that chat templates are told: the beginning of the job's day, UTC."""
        return datetime.combine(self.day, time(), UTC)

    @property
    def created(self) -> int:
        """`created` of every response, in seconds since 1970."""
        return int(self.now.timestamp())

    def name(self, purpose: str, number: int, custom_id: str) -> str:
        """32 hexadecimal digits for one purpose and row."""
        return self._digest(purpose, number, custom_id)[:32]

    def seed(self, number: int, custom_id: str) -> int:
        """The seed of a row that brings none."""
        return int(self._digest("seed", number, custom_id)[:16], 16) & _SEED_MASK

    def _digest(self, purpose: str, number: int, custom_id: str) -> str:
        return hashlib.sha256(f"{self.fingerprint} {purpose} {number} {custom_id}".encode()).hexdigest()


def config_sha256(config: Config, folder: Path) -> str:
    """Fingerprint of what answers follow from: keys of the config, and the checkpoint's files.

    Weights count by name and size: reading them all would take as long as loading them.
    """
    keys: dict[str, Any] = config.model_dump(mode="json", exclude=_NOT_OF_THE_ANSWERS)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    contents = [[path.relative_to(folder).as_posix(), _content(path)] for path in files]
    return hashlib.sha256(msgspec.json.encode([keys, contents], order="sorted")).hexdigest()


def _content(path: Path) -> str | int:
    size = path.stat().st_size
    if size >= _READ_WHOLE_BELOW or path.suffix == ".safetensors":
        return size
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
