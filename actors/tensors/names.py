"""Interim."""

from dataclasses import dataclass
from typing import Any


@dataclass
class CheckpointNames:
    ignorable: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> "CheckpointNames":
        return cls(frozenset(set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq"}))
