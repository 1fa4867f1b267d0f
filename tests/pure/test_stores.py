"""A node's copy of a checkpoint in a store: each byte comes once, whoever dies, and what fails is named."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.stores import disk as disk_module
from actors.stores import fetch as fetch_module
from actors.stores import mirror as mirror_module
from actors.stores import partial_file as partial_module
from actors.stores import retries
from actors.stores.fetch import fetch, fetch_all
from actors.stores.intervals import merged, num_bytes, pieces, without
from actors.stores.mirror import Mirror, mirror_of, open_mirror
from actors.stores.partial_file import PartialFile
from actors.words.errors import CheckpointError
from tests.fakes.range_server import RangeServer

pytestmark = pytest.mark.timeout(60)

PIECE = 4096
WANTED, UNWANTED = ["*.safetensors", "*.json", "*.txt"], ["consolidated*"]
SIZES = {"model-1.safetensors": 50_000, "model-2.safetensors": 33_333}


def write_checkpoint(folder: Path, seed: int = 0) -> None:
    """Files as they are at a store: of weights only the length of the header matters here."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(seed)
    (folder / "config.json").write_text('{"of": "nothing"}')
    (folder / "vocab.txt").write_text("words\n" * 100)
    (folder / "README.md").write_text("not for us")
    (folder / "consolidated.safetensors").write_bytes(b"not for us")
    for name, size in SIZES.items():
        (folder / name).write_bytes((100).to_bytes(8, "little") + rng.randbytes(size - 8))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(fetch_module, "_PIECE_BYTES", PIECE)
    monkeypatch.setattr(fetch_module, "_RECORD_S", 0.0)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    write_checkpoint(tmp_path / "there")
    with RangeServer(tmp_path / "there").running() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(store: RangeServer, cache: Path, version: str | None = None) -> Mirror:
    return open_mirror(store.url, version, cache, WANTED, UNWANTED)


def assert_is_here(mirror: Mirror, store: RangeServer, name: str, intervals: list[tuple[int, int]]) -> None:
    data = (mirror.folder / name).read_bytes()
    assert len(data) == len(store.files[name])
    for first, end in intervals:
        assert data[first:end] == store.files[name][first:end], (name, first, end)


# Sets of bytes


def test_sets_of_bytes_are_those_of_python() -> None:
    rng = random.Random(1)
    for _ in range(300):
        one, other = (
            [(first, first + rng.randrange(6)) for first in (rng.randrange(30) for _ in range(rng.randrange(6)))]
            for _ in range(2)
        )
        as_set = {byte for first, end in one for byte in range(first, end)}
        lacking = as_set - {byte for first, end in other for byte in range(first, end)}
        for intervals, expected in ((merged(one), as_set), (without(one, other), lacking)):
            assert {byte for first, end in intervals for byte in range(first, end)} == expected
            assert num_bytes(intervals) == len(expected)
            assert all(before[1] < after[0] for before, after in itertools.pairwise(intervals))
        cut = list(pieces(merged(one), 4))
        assert merged(cut) == merged(one)
        assert all(first // 4 == (end - 1) // 4 for first, end in cut)


# Files of which parts are here


def test_two_processes_do_not_hold_the_same_byte(tmp_path: Path) -> None:
    one, other = PartialFile(tmp_path / "file", 100), PartialFile(tmp_path / "file", 100)
    assert one.try_lock((0, 50))
    assert not other.try_lock((49, 60))
    assert other.try_lock((50, 60))
    one.write(0, b"x" * 50)
    assert other.missing([(0, 60)]) == [(0, 60)]
    one.record([(0, 50)])
    assert other.missing([(0, 60)]) == [(50, 60)]
    one.close()
    assert other.try_lock((0, 50))
    other.close()


def test_what_was_not_on_the_disk_does_not_outlive_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PartialFile(tmp_path / "file", 100)
    file.write(0, b"x" * 30)
    file.record([(0, 10), (20, 30)])
    file.sync()
    file.record([(10, 20)])
    file.close()
    again = PartialFile(tmp_path / "file", 100)
    assert again.missing([(0, 40)]) == [(30, 40)]
    again.close()
    (tmp_path / "boot_id").write_text("01234567-89ab-cdef-0123-456789abcdef")
    monkeypatch.setattr(partial_module, "_BOOT_ID", tmp_path / "boot_id")
    after = PartialFile(tmp_path / "file", 100)
    assert after.missing([(0, 40)]) == [(10, 20), (30, 40)]
    after.close()
    (tmp_path / "file").unlink()
    anew = PartialFile(tmp_path / "file", 100)
    assert anew.missing([(0, 40)]) == [(0, 40)]
    anew.close()


def test_a_record_that_was_half_written_is_written_over(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "file", 100)
    with (tmp_path / ".file.log").open("ab") as log:
        log.write(b"torn")
    assert file.missing([(0, 9)]) == [(0, 9)]
    file.record([(2, 5), (7, 8)])
    assert file.missing([(0, 9)]) == [(0, 2), (5, 7), (8, 9)]
    file.close()


# Fetching


def test_small_files_come_whole_and_weights_by_their_headers(store: RangeServer, cache: Path) -> None:
    mirror = opened(store, cache)
    assert sorted(mirror.files) == ["config.json", *SIZES, "vocab.txt"]
    for name in ("config.json", "vocab.txt"):
        assert_is_here(mirror, store, name, [(0, len(store.files[name]))])
    for name in SIZES:
        assert_is_here(mirror, store, name, [(0, 108)])
        assert store.sent_bytes(name) == 108
    assert store.weights() == []
    assert mirror_of(mirror.folder) == mirror and mirror_of(cache) is None
    num_requests = len(store.sent)
    assert opened(store, cache) == mirror
    assert len(store.sent) == num_requests


def test_only_the_ranges_that_are_wanted_come_and_only_once(store: RangeServer, cache: Path) -> None:
    mirror, before = opened(store, cache), store.sent_bytes()
    ranges = [(200, 300), (300, 9_000), (20_000, 20_001), (8_000, 10_000)]
    fetched = fetch(mirror, {"model-1.safetensors": ranges})
    assert fetched == store.sent_bytes() - before == 9_800 + 1
    assert all(one.end - one.first <= PIECE for one in store.weights())
    assert_is_here(mirror, store, "model-1.safetensors", ranges)
    assert fetch(mirror, {"model-1.safetensors": [(250, 9_500)]}) == 0
    assert fetch(mirror, {"model-1.safetensors": [(250, 10_500)]}) == 500
    rest = sum(SIZES.values()) - 2 * 108 - 9_801 - 500
    assert fetch_all(mirror) == rest
    for name, size in SIZES.items():
        assert_is_here(mirror, store, name, [(0, size)])
        assert store.sent_bytes(name) == size


def test_without_the_store_a_copy_that_is_here_serves(store: RangeServer, cache: Path) -> None:
    mirror = opened(store, cache)
    fetch_all(mirror)
    store.is_away = True
    assert opened(store, cache, mirror.version) == mirror
    assert fetch_all(mirror) == 0
    with pytest.raises(ValueError, match=r"model\.source: listing http.* failed 8 times"):
        opened(store, cache)


def test_another_version_is_another_folder(store: RangeServer, cache: Path) -> None:
    before = opened(store, cache)
    fetch_all(before)
    store.files["model-1.safetensors"] = store.files["model-1.safetensors"][:-1] + b"\0"
    after = opened(store, cache)
    assert after.folder != before.folder and opened(store, cache, before.version) == before
    fetch_all(after)
    assert_is_here(after, store, "model-1.safetensors", [(0, 50_000)])
    with pytest.raises(ValueError, match=rf"model\.revision: .* not at version 0123, but at {after.version}"):
        opened(store, cache, "0123")


def test_faults_pass_and_nothing_is_lost(store: RangeServer, cache: Path) -> None:
    kinds = itertools.cycle(["503", None, "short", None, "cut", None, None])

    def fault(name: str, first: int, end: int) -> str | None:
        return next(kinds) if end > 1 else None

    store.fault = fault
    mirror = opened(store, cache)
    assert fetch_all(mirror) == sum(SIZES.values()) - 2 * 108
    for name, size in SIZES.items():
        assert_is_here(mirror, store, name, [(0, size)])


def test_a_lost_connection_is_named_and_what_came_stays(store: RangeServer, cache: Path) -> None:
    mirror = opened(store, cache)

    def fault(name: str, first: int, end: int) -> str | None:
        return "503" if first >= 30_000 and name == "model-1.safetensors" else None

    store.fault = fault
    words = (
        r"model-1\.safetensors, bytes \d+ to \d+: failed 8 times.*\(0\.000 of 0\.000 GB are still missing in .*cache"
    )
    with pytest.raises(CheckpointError, match=words):
        fetch(mirror, {"model-1.safetensors": [(0, 50_000)]})
    store.fault = lambda *_: None
    assert 0 < fetch(mirror, {"model-1.safetensors": [(0, 50_000)]}) <= 50_000 - 30_000 + 2 * 8 * PIECE
    assert_is_here(mirror, store, "model-1.safetensors", [(0, 50_000)])


def test_a_file_that_changes_in_the_middle_is_refused(store: RangeServer, cache: Path) -> None:
    mirror = opened(store, cache)

    def change(name: str, first: int, end: int) -> None:
        if first > 20_000:
            store.files[name] = b"\0" * len(store.files[name])

    store.fault = change  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors has changed while it was fetched"):
        fetch(mirror, {"model-1.safetensors": [(0, 50_000)]})
    original = (cache.parent / "there" / "model-1.safetensors").read_bytes()
    file = mirror.partial("model-1.safetensors")
    missing = file.missing([(0, 50_000)])
    file.close()
    here = (mirror.folder / "model-1.safetensors").read_bytes()
    for first, end in without([(0, 50_000)], missing):
        assert here[first:end] == original[first:end]
    assert missing[-1][1] == 50_000


def test_missing_credentials_are_said_at_once(store: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """As botocore's."""

    class Locked:
        def invalidate_cache(self) -> None:
            """Nothing is cached."""

        def ls(self, *_: object, **__: object) -> None:
            raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(mirror_module, "filesystem_of", lambda url: Locked())
    with pytest.raises(ValueError, match=r"Unable to locate credentials; give the credentials.*AWS_ACCESS_KEY_ID"):
        opened(store, cache)


def test_a_store_that_sends_no_ranges_sends_whole_files(store: RangeServer, cache: Path) -> None:
    store.sends_ranges = False
    mirror = opened(store, cache)
    assert not mirror.sends_ranges
    for name, size in SIZES.items():
        assert_is_here(mirror, store, name, [(0, size)])
    num_requests = len(store.sent)
    assert fetch_all(mirror) == 0 and len(store.sent) == num_requests


def test_what_is_no_checkpoint_is_named(store: RangeServer, cache: Path) -> None:
    del store.files["config.json"]
    with pytest.raises(ValueError, match=r"model\.source: http.*/checkpoint holds no config\.json"):
        opened(store, cache)


def test_the_log_says_how_far_it_is(
    store: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetch_module, "_SAY_S", 0.0)
    mirror = opened(store, cache)
    with caplog.at_level(logging.INFO):
        fetch_all(mirror)
    said = [record.getMessage() for record in caplog.records if "fetching" in record.getMessage()]
    assert any("MB/s, about" in one and "s left" in one for one in said) and "so far" in said[-1]


# Disks


def test_a_disk_without_room_is_named_before_anything_comes(
    store: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, before = opened(store, cache), len(store.sent)
    usage = disk_module.shutil.disk_usage(cache)
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(CheckpointError, match=r"still to be fetched.*has 0\.000 GB left.*model\.cache_folder"):
        fetch_all(mirror)
    assert len(store.sent) == before


def in_process(work: object, *args: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)  # type: ignore[arg-type]
    process.start()
    return process


def test_a_disk_that_fills_up_is_named(store: RangeServer, cache: Path) -> None:
    mirror = opened(store, cache)
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            fetch(mirror, {"model-1.safetensors": [(0, 50_000)]})
        except CheckpointError as error:
            answers.put(str(error))

    process = in_process(fill)
    process.join(30)
    assert process.exitcode == 0
    said = answers.get()
    for words in ("File too large", "model-1.safetensors", "set model.cache_folder", "what is there stays"):
        assert words in said
    assert fetch(mirror, {"model-1.safetensors": [(0, 50_000)]}) < 50_000
    assert_is_here(mirror, store, "model-1.safetensors", [(0, 50_000)])


def test_a_full_disk_is_no_matter_of_tries(store: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.sends_ranges = False
    tries = []

    def get_file(self: object, url: str, path: str) -> None:
        tries.append(url)
        Path(path).write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(type(mirror_module.filesystem_of(store.url)), "get_file", get_file)
    with pytest.raises(CheckpointError, match=r"No space left on device.*set model\.cache_folder"):
        opened(store, cache)
    assert len(tries) == len(set(tries)) and not list(cache.rglob("*.part"))


def test_files_that_come_whole_must_have_room_together(
    store: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.sends_ranges = False
    usage = disk_module.shutil.disk_usage(cache.parent)
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda path: usage._replace(free=60_000))
    with pytest.raises(CheckpointError, match=r"still to be fetched.*model\.cache_folder"):
        opened(store, cache)
    assert store.weights() == []


# Folders that are none of our copies


def test_a_manifest_counts_only_where_it_would_have_been_written(store: RangeServer, cache: Path) -> None:
    mirror = opened(store, cache)
    there = json.loads((mirror.folder / ".mirror.json").read_bytes())
    elsewhere = cache / "downloaded" / mirror.version
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.json").write_text("{}")
    (elsewhere / "model-1.safetensors").write_bytes(b"the user's own")
    outside = {"../of_the_user.json": {"size": 1, "tag": ""}}
    for manifest in (there, [], 5, {}, {**there, "files": []}, {**there, "url": 5}, {**there, "files": outside}):
        (elsewhere / ".mirror.json").write_text(json.dumps(manifest))
        assert mirror_of(elsewhere) is None
    for changed in ({**there, "files": outside}, {**there, "url": store.url + "/other"}, []):
        (mirror.folder / ".mirror.json").write_text(json.dumps(changed))
        assert mirror_of(mirror.folder) is None
    assert opened(store, cache) == mirror == mirror_of(mirror.folder)  # written anew
    assert (elsewhere / "model-1.safetensors").read_bytes() == b"the user's own"


def test_a_store_that_tells_no_versions_is_warned_of(
    store: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "_TAGS", ())
    opened(store, cache)
    assert "tells no versions of config.json apart" in caplog.text


# Processes


def settled_bytes(store: RangeServer) -> int:
    """What the store has sent, once it sends nothing more to a process that is dead."""
    before, since = store.sent_bytes(), time.monotonic()
    while time.monotonic() - since < 0.3:
        time.sleep(0.01)
        if (now := store.sent_bytes()) != before:
            before, since = now, time.monotonic()
    return before


def test_a_killed_fetch_goes_on(store: RangeServer, cache: Path) -> None:
    mirror = opened(store, cache)
    store.seconds_each, store.fault = 0.05, lambda *_: "slow"
    process = in_process(fetch_all, mirror)
    while len(store.weights()) < 12:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store.fault, store.seconds_each = lambda *_: None, 0.0
    before = settled_bytes(store)
    rest = fetch_all(mirror)
    total = sum(SIZES.values())
    assert 0 < rest < total - 2 * 108 and store.sent_bytes() - before == rest
    assert sum(store.sent_bytes(name) for name in SIZES) <= total + (8 + 8) * PIECE  # in flight, or not recorded yet
    for name, size in SIZES.items():
        assert_is_here(mirror, store, name, [(0, size)])


def test_processes_of_a_node_share_one_fetch(store: RangeServer, cache: Path) -> None:
    opened(store, cache.with_name("other"))  # so that no process has to import what it needs
    store.sent.clear()
    store.seconds_each, store.fault = 0.01, lambda *_: "slow"
    start = multiprocessing.get_context("fork").Event()

    def take_part(first: int) -> None:
        start.wait()
        fetch(opened(store, cache), {name: [(first, size)] for name, size in SIZES.items()})

    processes = [in_process(take_part, first) for first in (0, 0, 10_000)]
    start.set()
    try:
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    mirror = opened(store, cache)
    for name, size in SIZES.items():
        assert store.sent_bytes(name) == size
        assert_is_here(mirror, store, name, [(0, size)])
