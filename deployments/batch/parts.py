"""A part: the answers and the error rows of a range of rows, in one file that is written once."""

import hashlib
from collections.abc import Mapping

import msgspec

from deployments.batch.store import Store

_HEAD_BYTES = 1024  # what a head takes at most


class PartHead(msgspec.Struct, frozen=True):
    """The first line of a part. After it come the answers, then the error rows, both in the order of the input."""

    first: int  # number of its first row
    rows: int
    completed: int
    failed: int
    results_bytes: int
    errors_bytes: int
    sha256: str  # of everything after this line


def part_name(part: int) -> str:
    """The name of a part's file."""
    return f"part-{part:05d}.jsonl"


def encode_part(rows: range, results: Mapping[int, bytes], errors: Mapping[int, bytes]) -> tuple[PartHead, bytes]:
    """A part, and its file. `results` and `errors`: lines by row, each row in one of them."""
    answers = b"".join(results[number] for number in rows if number in results)
    error_rows = b"".join(errors[number] for number in rows if number in errors)
    assert len(results) + len(errors) == len(rows), "every row of a part has ended, once"
    digest = hashlib.sha256(answers + error_rows).hexdigest()
    head = PartHead(rows.start, len(rows), len(results), len(errors), len(answers), len(error_rows), digest)
    return head, msgspec.json.encode(head) + b"\n" + answers + error_rows


def read_head(store: Store, part: int, size: int) -> PartHead | None:
    """The head of a part whose file has `size` bytes; None when the file is not whole."""
    data = store.read(part_name(part), _HEAD_BYTES)
    if data is None:
        return None
    head, num_bytes = _head(data)
    return head if head is not None and num_bytes + head.results_bytes + head.errors_bytes == size else None


def read_part(store: Store, part: int) -> tuple[bytes, bytes]:
    """The lines of answers and of error rows. Raises ValueError when they are not what was written."""
    data = store.read(part_name(part)) or b""
    head, num_bytes = _head(data)
    if head is None or hashlib.sha256(data[num_bytes:]).hexdigest() != head.sha256:
        raise ValueError(
            f"{store.folder}/{part_name(part)}: is not what was written; remove it, and start the same command again"
        )
    end = num_bytes + head.results_bytes
    return data[num_bytes:end], data[end:]


def _head(data: bytes) -> tuple[PartHead | None, int]:
    """The head that `data` begins with, and how many bytes it takes."""
    line, newline, _ = data.partition(b"\n")
    try:
        return (msgspec.json.decode(line, type=PartHead) if newline else None), len(line) + 1
    except msgspec.MsgspecError:
        return None, 0
