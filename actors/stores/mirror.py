"""A node's copy of a checkpoint in an object store: a folder a version, its weights as far as they were fetched."""

import contextlib
import fnmatch
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.stores.disk import ROOM, check_room, locked, write_whole
from actors.stores.partial_file import PartialFile
from actors.stores.retries import Pause, patiently
from actors.stores.urls import filesystem_of
from actors.words.errors import CheckpointError

WEIGHTS = "*.safetensors"  # a pattern; see is_weights
logger = logging.getLogger(__name__)

_MANIFEST = ".mirror.json"
_LENGTH_BYTES = 8  # that say how long a header is
_MAX_BYTES = 100_000_000  # the format's own limit
_NUM_AT_ONCE = 8  # files that are looked at, or fetched whole, at a time
_TAGS = (
    *("ETag", "etag", "md5Hash", "generation", "Content-MD5", "LastModified", "Last-Modified", "mtime", "updated"),
    *("blob_id", "xet_hash", "last_modified", "modificationTime"),  # the hub, Azure, WebHDFS
)


@dataclass(frozen=True)
class StoredFile:
    """A file as the store has it."""

    size: int  # bytes
    tag: str  # by which the store tells versions apart; empty: it tells none

    def __str__(self) -> str:
        """For messages."""
        return f"{self.size} bytes, tag {self.tag or 'none'}"


@dataclass(frozen=True)
class Mirror:
    """What a version of a checkpoint consists of, and where this node has its copy."""

    folder: Path
    url: str
    files: dict[str, StoredFile]
    sends_ranges: bool  # otherwise files are fetched whole

    @property
    def version(self) -> str:
        """What tells this version from others at the same URL."""
        return self.folder.name

    def partial(self, name: str) -> PartialFile:
        """A file of weights. Raises CheckpointError."""
        try:
            return PartialFile(self.folder / name, self.files[name].size)
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} cannot be opened: {error}; {ROOM}") from error

    def check(self, filesystem: Any, name: str, pause: Pause = time.sleep) -> None:
        """Raises CheckpointError unless the store still has this version of a file."""
        now = stored_file(filesystem, self.url, name, pause)
        if now != self.files[name]:
            raise CheckpointError(
                f"model.source: {self.url}/{name} has changed while it was fetched: {self.files[name]} before, {now} "
                "now; nothing of the new file is used. Write another version of a checkpoint to another prefix, or "
                "start anew to load this one"
            )


def open_mirror(url: str, version: str | None, cache: Path, wanted: Sequence[str], unwanted: Sequence[str]) -> Mirror:
    """The node's copy of the checkpoint at a URL, with its small files and the headers of its weights.

    `wanted`, `unwanted`: patterns of the files' names. With a version that is here, the store is not asked. One
    process of a node fetches, the others wait. Raises CheckpointError, or ValueError that names what the store said.
    """
    url = url.rstrip("/")
    base = copies_of(url, cache)
    try:
        base.mkdir(parents=True, exist_ok=True)
        with locked(base / ".lock"):
            mirror = None if version is None else mirror_of(base / version)
            filesystem = None
            if mirror is None:
                filesystem = filesystem_of(url)
                mirror = _ask(filesystem, url, version, base, wanted, unwanted)
            _fetch_small(mirror, filesystem)
        logger.info("%s is at version %s; the copy of this node: %s", url, mirror.version, mirror.folder)
        return mirror
    except OSError as error:
        raise CheckpointError(f"model.source: {url} cannot be copied to {base}: {error}; {ROOM}") from error


def copies_of(url: str, cache: Path) -> Path:
    """The folder of a node's copies of all versions at a URL."""
    url = url.rstrip("/")
    return cache / f"{re.sub('[^A-Za-z0-9.]+', '-', url)[-60:].strip('-')}-{_digest(url)[:8]}"


def mirror_of(folder: Path) -> Mirror | None:
    """The mirror that a folder is, None for any other folder, whatever its files say of it.

    A manifest counts only where it would have been written: in the folder of its own URL and version.
    """
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        files = {name: StoredFile(int(file["size"]), str(file["tag"])) for name, file in manifest["files"].items()}
        is_here = copies_of(manifest["url"], folder.parent.parent) == folder.parent and _version(files) == folder.name
        if is_here and all(Path(name).name == name and not name.startswith(".") for name in files):
            return Mirror(folder, str(manifest["url"]), files, bool(manifest["sends_ranges"]))
    return None


def _version(files: dict[str, StoredFile]) -> str:
    return _digest(json.dumps({name: asdict(file) for name, file in files.items()}))[:16]


def stored_file(filesystem: Any, url: str, name: str, pause: Pause = time.sleep) -> StoredFile:
    """Size and tag of a file. Raises ValueError that names the URL."""

    def look() -> StoredFile:
        try:
            filesystem.invalidate_cache()
            info = filesystem.info(f"{url}/{name}")
        except FileNotFoundError as error:
            if error.__cause__ is None or getattr(error.__cause__, "status", None) == 404:
                raise
            raise ConnectionError(str(error.__cause__)) from error  # of HTTP every failure is said to be one
        tag = next((str(info[key]) for key in _TAGS if info.get(key)), "")
        if info.get("size") is None:
            raise ValueError("the store does not say how long it is")
        return StoredFile(int(info["size"]), tag)

    return patiently(f"model.source: looking at {url}/{name}", look, pause)


def _ask(
    filesystem: Any, url: str, version: str | None, base: Path, wanted: Sequence[str], unwanted: Sequence[str]
) -> Mirror:
    """What the store has now, noted in a folder of its own. Raises ValueError where it is not the version asked for."""

    def list_names() -> list[str]:
        filesystem.invalidate_cache()
        found = filesystem.ls(f"{url}/" if url.startswith("http") else url, detail=True)
        return [str(one["name"]).rpartition("/")[2] for one in found if one["type"] == "file"]

    names = sorted(
        name for name in set(patiently(f"model.source: listing {url}", list_names)) if is_chosen(name, wanted, unwanted)
    )
    if "config.json" not in names:
        raise ValueError(f"model.source: {url} holds no config.json; name the prefix of a Transformers checkpoint")
    with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
        files = dict(zip(names, pool.map(lambda name: stored_file(filesystem, url, name), names), strict=True))
    found = _version(files)
    if version is not None and found != version:
        raise ValueError(
            f"model.revision: {url} is not at version {version}, but at {found}, and this node has no copy of "
            "the other; start anew to load what is there, or leave model.revision out"
        )
    if (known := mirror_of(base / found)) is not None:
        return known
    if untagged := [name for name, file in files.items() if not file.tag]:
        logger.warning(
            "%s tells no versions of %s apart: a file that is replaced by one of the same size is not noticed; write "
            "another version to another prefix, or remove %s before you start anew",
            *(url, untagged[0], base),
        )
    first_byte = patiently(f"model.source: {url}", lambda: filesystem.cat_file(f"{url}/config.json", start=0, end=1))
    mirror = Mirror(base / found, url, files, len(first_byte) == 1)
    mirror.folder.mkdir(exist_ok=True)
    manifest = asdict(mirror)
    del manifest["folder"]
    write_whole(mirror.folder / _MANIFEST, json.dumps(manifest).encode())
    return mirror


def is_chosen(name: str, wanted: Iterable[str], unwanted: Iterable[str] = ()) -> bool:
    """Whether a file's name is one of those wanted, by their patterns, and none of those unwanted."""
    matched = partial(fnmatch.fnmatchcase, name)
    return any(map(matched, wanted)) and not any(map(matched, unwanted))


def is_weights(name: str) -> bool:
    """Whether a file holds weights, which are fetched in ranges."""
    return is_chosen(name, [WEIGHTS])


def _fetch_small(mirror: Mirror, filesystem: Any) -> None:
    """Fetch what is not here yet of all files but weights, and the headers of those."""
    lacking = [name for name in mirror.files if not _is_here(mirror, name)]
    if not lacking:
        return
    whole = [name for name in lacking if not mirror.sends_ranges or not is_weights(name)]
    check_room(mirror.folder, sum(mirror.files[name].size for name in whole), mirror.url)
    filesystem = filesystem or filesystem_of(mirror.url)
    with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
        for _ in pool.map(lambda name: _fetch_file(mirror, filesystem, name), lacking):
            pass


def _is_here(mirror: Mirror, name: str) -> bool:
    if not is_weights(name):
        return (mirror.folder / name).is_file()
    file = mirror.partial(name)
    try:
        start = (0, min(_LENGTH_BYTES, mirror.files[name].size))
        return not file.missing([start])  # both parts of a header are recorded together
    finally:
        file.close()


def _fetch_file(mirror: Mirror, filesystem: Any, name: str) -> None:
    """A small file, or the header of a file of weights; checked for a change in the meantime before it counts."""
    size = mirror.files[name].size
    if not is_weights(name):
        data = read_range(mirror, filesystem, name, 0, size)
        mirror.check(filesystem, name)
        write_whole(mirror.folder / name, data)
        return
    if not mirror.sends_ranges:
        _fetch_whole(mirror, filesystem, name)
    file, here = mirror.partial(name), size
    try:
        if mirror.sends_ranges:
            header = _read_header(mirror, filesystem, name)
            file.write(0, header)
            mirror.check(filesystem, name)
            here = len(header)
        file.record([(0, here)])
    finally:
        file.close()


def _read_header(mirror: Mirror, filesystem: Any, name: str) -> bytes:
    """The header of a file of weights with the length before it, or only that where it cannot be one."""
    size = mirror.files[name].size
    length = read_range(mirror, filesystem, name, 0, min(_LENGTH_BYTES, size))
    end = len(length) + int.from_bytes(length, "little")
    return length + read_range(mirror, filesystem, name, len(length), end) if end <= min(size, _MAX_BYTES) else length


def _fetch_whole(mirror: Mirror, filesystem: Any, name: str) -> None:
    """A file of a store that sends no ranges, in one piece that cannot be resumed."""
    beside, size = mirror.folder / f".{name}.part", mirror.files[name].size

    def fetch() -> None:
        filesystem.get_file(f"{mirror.url}/{name}", str(beside))
        if beside.stat().st_size != size:
            raise ConnectionError(f"{beside.stat().st_size} bytes came, of {size}")

    try:
        patiently(f"model.source: {mirror.url}/{name}", fetch)
        mirror.check(filesystem, name)
        beside.replace(mirror.folder / name)
    finally:
        beside.unlink(missing_ok=True)


def read_range(mirror: Mirror, filesystem: Any, name: str, first: int, end: int, pause: Pause = time.sleep) -> bytes:
    """Bytes [first, end) of a file; tried again while the store fails. Raises ValueError that names file and place."""

    def fetch() -> bytes:
        if first >= end:
            return b""
        data = bytes(filesystem.cat_file(f"{mirror.url}/{name}", start=first, end=end))
        if len(data) != end - first:
            raise ConnectionError(f"{len(data)} bytes came, of {end - first}")
        return data

    return patiently(f"model.source: {mirror.url}/{name}, bytes {first} to {end}", fetch, pause)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
