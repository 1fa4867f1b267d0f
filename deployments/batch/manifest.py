"""The manifest: what a job is, written before its first part; and at its end, what came of it."""

from datetime import date

import msgspec

from deployments.batch.identity import Identity
from deployments.batch.store import Store

_MANIFEST, _LENGTH, _DONE = "manifest.json", "length.json", "done.json"


class Manifest(msgspec.Struct, frozen=True):
    """The file manifest.json."""

    input_sha256: str
    config_sha256: str
    day: date
    part_rows: int
    rows: int
    errors: str  # where the error rows go
    format: int = 1


class _Length(msgspec.Struct, frozen=True):
    """The file length.json."""

    max_model_len: int


class Done(msgspec.Struct, frozen=True):
    """The file done.json."""

    rows: int
    completed: int
    failed: int


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of the job in this store; None when there is none. Raises ValueError for one of another version."""
    data = store.read(_MANIFEST)
    try:
        manifest = None if data is None else msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{store.folder}/{_MANIFEST}: cannot be read ({error}); name another --output") from None
    if manifest is not None and manifest.format != 1:
        raise ValueError(f"{store.folder}: was written by a newer version of stagemesh; go on with that one")
    return manifest


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Write it, or agree with the one that is there. Raises ValueError where that is of another job."""
    if not store.create(_MANIFEST, msgspec.json.encode(manifest)):
        check_manifest(store, read_manifest(store), manifest)


def check_manifest(store: Store, there: Manifest | None, asked: Manifest) -> None:
    """Raises ValueError, naming both, where the job that is there is another than the one that is asked for."""
    if there is None or there == asked:
        return
    remedy = "start the command as it was, or name another --output"
    for name, words in (
        ("input_sha256", "holds answers to other rows (fingerprint of the input: {there}, of this one: {asked})"),
        ("config_sha256", "was begun with another config or checkpoint (fingerprint: {there}, of this one: {asked})"),
        ("day", "was begun for another day ({there}, not {asked})"),
        ("part_rows", "was begun with --part-rows {there}, not {asked}"),
        ("errors", "was begun with --errors {there}, not {asked}"),
    ):
        ours, theirs = getattr(asked, name), getattr(there, name)
        if ours != theirs:
            raise ValueError(f"{store.folder}: {words.format(there=theirs, asked=ours)}; {remedy}")


def identity_of(manifest: Manifest) -> Identity:
    """What ids, seeds and dates of the job's rows follow from."""
    return Identity(manifest.input_sha256, manifest.config_sha256, manifest.day)


def agree_on_length(store: Store, max_model_len: int) -> int:
    """Tokens of the job's longest request: what its first gang held. Raises ValueError where a gang holds less."""
    if store.create(_LENGTH, msgspec.json.encode(_Length(max_model_len))):
        return max_model_len
    longest = msgspec.json.decode(store.read(_LENGTH) or b"", type=_Length).max_model_len
    if max_model_len < longest:
        raise ValueError(
            f"{store.folder}: was begun by a gang with memory for requests of {longest} tokens, but another one has it "
            f"for {max_model_len}, and would answer otherwise; go on where there is as much, or set "
            f"model.max_model_len to {max_model_len} and name another --output"
        )
    return longest


def read_done(store: Store) -> Done | None:
    """What came of the job; None while it is not done."""
    data = store.read(_DONE)
    return None if data is None else msgspec.json.decode(data, type=Done)


def write_done(store: Store, done: Done) -> None:
    """Say that the job is done, for good."""
    store.create(_DONE, msgspec.json.encode(done))
