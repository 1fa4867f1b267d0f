"""Ids that stand twice: found before anything starts, with eight bytes a row in memory."""

import hashlib
from array import array

import numpy as np

from deployments.batch.row_forms import custom_id_of
from deployments.batch.source import Source


def survey_with_ids(source: Source) -> None:
    """Survey the input. Raises ValueError where two rows have one custom_id, with both places."""
    hashes = array("Q", (_hash(custom_id_of(line)) for line in source.survey()))
    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, np.uint64)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    places: dict[str, str] = {}
    for line in source.again():
        custom_id = custom_id_of(line)
        if _hash(custom_id) in suspects and (first := places.setdefault(custom_id, line.place)) != line.place:
            raise ValueError(
                f"--input: custom_id {custom_id[:100]!r} stands in {first} and in {line.place}; answers could not be "
                "told apart: give each row its own (a row without one counts as row-N, by its number)"
            )


def _hash(custom_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest(), "big")
