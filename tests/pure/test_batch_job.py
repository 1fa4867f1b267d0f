"""Batch jobs: every row once and in order, whatever dies or fails; two drivers, other inputs, files in the way."""

import contextlib
import gc
import json
import threading
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import fsspec
import msgspec
import pytest

from configs.api import ApiConfig
from configs.config import Config, NetworkConfig
from deployments.batch import answerer, journal, lease
from deployments.batch.identity import config_sha256
from deployments.batch.lease import Holder, Lease
from deployments.batch.manifest import agree_on_length
from deployments.batch.object_store import ObjectStore
from deployments.batch.places import default_errors
from deployments.batch.store import LocalStore
from tests.fakes.batch_jobs import Desk, chat, some_rows
from tests.fakes.fake_answerer import FakeAnswerer
from tests.fakes.fake_stores import Bucket, DyingStore, Killed, now_and_then

DAY = date(2026, 2, 3)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    desk.write(some_rows(43))
    return desk


@pytest.fixture
def lives(monkeypatch):
    """Each driver is a process of its own, as far as leases can tell: what was killed counts as dead."""
    real, count = Holder.here, iter(range(1_000_000))
    monkeypatch.setattr(
        Holder, "here", classmethod(lambda cls: msgspec.structs.replace(real(), started=f"life {next(count)}"))
    )


def without_waiting(bucket, folder="bucket://b/out.jsonl.parts"):
    return ObjectStore(bucket, folder, pause=lambda seconds: None)


# What comes out


def test_answers_come_in_the_order_of_the_rows_and_errors_beside_them(desk):
    summary = desk.run(day=DAY)
    answers, errors = desk.lines()
    rows = some_rows(43)
    ids = [row.get("custom_id", f"row-{at + 1}") for at, row in enumerate(rows)]
    failed = [at for at in range(43) if at % 5 == 3]
    assert [one["custom_id"] for one in answers] == [ids[at] for at in range(43) if at not in failed]
    assert [one["custom_id"] for one in errors] == [ids[at] for at in failed]
    assert (summary.rows, summary.completed, summary.failed, summary.skipped) == (43, 35, 8, 0)
    for one in [*answers, *errors]:
        assert one["id"].startswith("batch_req_") and one["error"] is None
        assert one["response"]["request_id"].startswith("req_")
    assert len({one["id"] for one in [*answers, *errors]}) == 43
    assert {one["response"]["status_code"] for one in answers} == {200}
    body = answers[0]["response"]["body"]
    assert body["object"] == "chat.completion" and body["created"] == 1770076800  # that day's beginning, UTC
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"


def test_two_jobs_give_the_same_bytes_in_whatever_order_rows_are_answered(desk):
    desk.run("one.jsonl", FakeAnswerer(window=1), day=DAY)
    desk.run("two.jsonl", FakeAnswerer(window=30, order=9), day=DAY, part_rows=7)
    assert desk.results("one.jsonl") == desk.results("two.jsonl")
    desk.run("three.jsonl", day=date(2026, 2, 4))
    assert desk.results("one.jsonl") != desk.results("three.jsonl")


def test_rows_without_a_seed_get_one_each_and_those_with_one_keep_it(desk):
    seeds = {}
    desk.run(answerer=FakeAnswerer(before=lambda row: seeds.update({row.custom_id: row.body.seed})))
    own = [seed for custom_id, seed in seeds.items() if custom_id.startswith("row-") and seed == 5]
    others = [seed for seed in seeds.values() if seed != 5]
    assert len(own) == 8 and len(set(others)) == len(others) == 27 and all(0 <= seed < 2**63 for seed in others)


def test_error_rows_can_be_sent_again(desk):
    desk.run()
    _, errors = desk.lines()
    mended = [json.loads(json.dumps(row).replace('"temperature": 7', '"temperature": 1')) for row in errors]
    desk.write([*errors, '{"broken'])
    again = desk.run("again.jsonl")
    assert (again.completed, again.failed) == (0, 9)
    desk.write(mended)
    assert desk.run("mended.jsonl").completed == 8
    assert [one["custom_id"] for one in desk.lines("mended.jsonl")[0]] == [one["custom_id"] for one in errors]


def test_a_job_that_is_done_is_not_computed_again(desk):
    desk.run()
    before, untouched = desk.results(), FakeAnswerer()
    summary = desk.run(answerer=untouched)
    assert summary.skipped == summary.rows == 43 and not untouched.answered
    assert desk.results() == before
    assert {path.name for path in (desk.folder / "out.jsonl.parts").iterdir()} >= {"manifest.json", "done.json"}
    assert not list((desk.folder / "out.jsonl.parts").glob("part-*"))
    (desk.folder / "out.jsonl").unlink()
    with pytest.raises(ValueError, match=r"was written, and is gone; to compute it again, remove .*out\.jsonl\.parts"):
        desk.run()


# What is refused


def test_another_job_under_the_same_output_is_refused(desk):
    with pytest.raises(Killed):
        desk.run(answerer=FakeAnswerer(before=killing_at("c20")), day=DAY)
    wrong = [
        (lambda: desk.run(day=date(2026, 2, 4)), r"was begun for another day \(2026-02-03, not 2026-02-04\)"),
        (lambda: desk.run(part_rows=9), "was begun with --part-rows 8, not 9"),
        (lambda: desk.run(errors=str(desk.folder / "e")), "was begun with --errors"),
    ]
    other = desk.config.model_copy(update={"model": desk.config.model.model_copy(update={"max_model_len": 77})})
    wrong.append(
        (lambda: desk.run(config=other), "begun with another config or checkpoint .*fingerprint: [0-9a-f]{64}")
    )
    for run, words in wrong:
        with pytest.raises(ValueError, match=words):
            run()
    logged = Config.model_validate(desk.config.model_dump() | {"monitoring": {"access_log": "none"}})
    logged = logged.model_copy(update={"api": ApiConfig(keys="file:/keys"), "network": NetworkConfig(interface="lo")})
    folder = Path(desk.config.model.source)
    assert config_sha256(logged, folder) == config_sha256(desk.config, folder)
    slower = desk.config.model_copy(update={"timeouts": desk.config.timeouts.model_copy(update={"start_s": 7.0})})
    rows = desk.input.read_bytes()
    desk.write(some_rows(44))
    with pytest.raises(ValueError, match=r"holds answers to other rows .*start the command as it was, or name another"):
        desk.run()
    desk.input.write_bytes(rows)
    assert desk.run(config=slower).completed == 35  # what changes no answer may change; day and parts are the job's
    (Path(desk.config.model.source) / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match="begun with another config or checkpoint"):
        desk.run()


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl"])
def test_a_file_in_the_way_is_never_overwritten(desk, name):
    (desk.folder / name).write_text("precious")
    with pytest.raises(ValueError, match="is there, and no job that goes on; move it, or name another file"):
        desk.run()
    assert (desk.folder / name).read_text() == "precious"
    (desk.folder / name).unlink()
    with pytest.raises(ValueError, match="is there, and is not what this job writes"):
        desk.run(answerer=FakeAnswerer(before=lambda row: (desk.folder / name).write_text("precious")))
    assert (desk.folder / name).read_text() == "precious"


def test_the_same_file_for_both_and_a_folder_are_refused(desk):
    with pytest.raises(ValueError, match="is the same file as --output"):
        desk.run("x.jsonl", errors=str(desk.folder / "x.jsonl"))
    with pytest.raises(ValueError, match=r"--output: .* is a folder"):
        desk.run("checkpoint")
    with pytest.raises(ValueError, match="is no folder; make it first"):
        desk.run("not/there.jsonl")


def test_errors_on_another_file_system_are_refused_at_the_start(desk):
    elsewhere = Path("/dev/shm")
    if elsewhere.stat().st_dev == desk.folder.stat().st_dev:
        elsewhere = Path("/proc/self")  # the only other one that is there for sure
    with pytest.raises(ValueError, match="--errors: must be on the same file system as --output; leave it out"):
        desk.run(errors=str(elsewhere / "errors.jsonl"))
    assert not (desk.folder / "out.jsonl.parts").exists()


def test_the_input_may_not_change_while_the_job_runs(desk):
    """No row that has changed is answered: its answer would stay when the file is put back."""
    desk.write([chat(at, user="x" * 20_000) for at in range(43)])  # more than is read at once
    desk.run("plain.jsonl", day=DAY)
    plain = desk.input.read_bytes()
    seen = []

    def change(row):
        seen.append(row.number)
        desk.input.write_bytes(plain.replace(b"question 35", b"question 99"))

    with pytest.raises(ValueError, match=r"has changed since the job began \(row 36\)"):
        desk.run(answerer=FakeAnswerer(window=1, before=change), day=DAY)
    assert seen == list(range(35))
    desk.input.write_bytes(plain)
    assert desk.run(day=DAY).skipped == 35 and desk.results() == desk.results("plain.jsonl")


# Two drivers


def test_a_second_driver_is_refused_by_name(desk):
    def second(row):
        with pytest.raises(ValueError, match=r"the process \d+ on \S+, since 20\S+, works on this output"):
            desk.run()

    assert desk.run(answerer=FakeAnswerer(before=second)).completed == 35


def test_a_driver_that_was_taken_over_stops_by_name_and_every_row_is_there_once(desk, lives, monkeypatch):
    monkeypatch.setattr(journal, "_SAVE_S", -1.0)  # each row is due, the one too that ends after the take-over
    desk.run("plain.jsonl", day=DAY)
    taken = []

    def take_over(row):
        if not taken and row.number > 20:
            taken.append(desk.run(day=DAY))

    with pytest.raises(ValueError, match=r"the process \d+ on .* has taken this job over"):
        desk.run(answerer=FakeAnswerer(before=take_over), day=DAY)
    assert taken[0].completed == 35
    assert not list((desk.folder / "out.jsonl.parts").glob("journal-*"))
    assert desk.results() == desk.results("plain.jsonl")


def test_a_driver_that_was_taken_over_writes_no_part(desk, lives):
    parts, others = desk.folder / "out.jsonl.parts", []

    def take_over(row):
        if not others and row.number > 20:
            others.append(Lease(LocalStore(str(parts))).__enter__())
            others.append(set(parts.glob("part-*")))

    with pytest.raises(ValueError, match="has taken this job over"):
        desk.run(answerer=FakeAnswerer(window=2, before=take_over))
    others[0].__exit__()
    assert set(parts.glob("part-*")) == others[1] != set()


def test_on_another_machine_a_silent_driver_has_ended_and_one_that_beats_has_not(tmp_path, monkeypatch):
    store, looks = LocalStore(str(tmp_path / "parts")), []
    mine = Holder.here()
    monkeypatch.setattr(Holder, "here", classmethod(lambda cls: msgspec.structs.replace(mine, machine="another")))
    first = Lease(store)
    first.__enter__()
    first._end.set()
    first._thread.join()
    monkeypatch.setattr(Holder, "here", classmethod(lambda cls: mine))

    def beat(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            store.replace("beat-00001", b"3")

    with pytest.raises(ValueError, match="works on this output"):
        Lease(store, pause=beat).__enter__()
    assert len(looks) == 3
    with Lease(store, pause=looks.append) as taken:
        assert len(looks) == 3 + lease.EXPIRES_S and taken.number == 2
    with pytest.raises(ValueError, match="has taken this job over"):
        first.check()


@pytest.mark.timeout(20)
def test_a_driver_whose_sign_of_life_failed_goes_on_giving_them(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    store, written, failures = LocalStore(str(tmp_path / "parts")), threading.Event(), [OSError("full"), ValueError()]
    replace = store.replace

    def failing(name, data):
        if failures:
            raise failures.pop()
        replace(name, data)
        written.set()

    monkeypatch.setattr(store, "replace", failing)
    with Lease(store):
        assert written.wait(15)
        assert store.read("beat-00001") != b"ended"


def test_entries_of_a_journal_may_hold_a_carriage_return():
    data = b'{"number":3,"is_error":true,"line":{"row":\r1}}\n{"number":4,"is_error":false,"line":{}}\n{"number":5,"is'
    assert [entry.number for entry in journal._entries(data)] == [3, 4]


def test_of_drivers_that_start_together_one_works(tmp_path):
    store = LocalStore(str(tmp_path / "parts"))
    start, outcomes = threading.Barrier(6), []

    def drive():
        start.wait()
        try:
            with Lease(store):
                outcomes.append("works")
                done.wait()
        except ValueError:
            outcomes.append("refused")

    done = threading.Event()
    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 6:
        done.wait(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 5 + ["works"]


# Lengths


def test_every_gang_and_run_takes_requests_of_the_length_that_the_first_one_took(tmp_path):
    store = LocalStore(str(tmp_path / "parts"))
    assert [agree_on_length(store, length) for length in (4096, 4096, 5000)] == [4096] * 3
    with pytest.raises(ValueError, match=r"memory for requests of 4096 tokens, .* for 409, .*set model.max_model_len"):
        agree_on_length(store, 409)
    bucket = without_waiting(Bucket())
    assert [agree_on_length(bucket, length) for length in (40, 4096)] == [40, 40]


def test_a_gang_that_may_take_longer_requests_is_told_before_it_gets_rows(monkeypatch):
    monkeypatch.setattr(answerer.ray, "get", lambda ref: ref)
    config = Config.model_validate({"model": {"source": "/nowhere", "name": "tiny"}})
    gangs, told = answerer.GangAnswerer(config, None, None, lambda length: min(length, 400)), []
    gang = answerer._Gang(0, None, pending=512)
    gang.host = SimpleNamespace(limit=SimpleNamespace(remote=lambda length: told.append(length) or length))
    assert not list(gangs._take(gang, 512, None))
    assert told == [400] and not gang.is_ready and gang.pending == 400
    assert not list(gangs._take(gang, 400, None))
    assert told == [400] and gang.is_ready and gang.pending is None


# Deaths


def killing_at(custom_id):
    def before(row):
        if row.custom_id == custom_id:
            raise Killed

    return before


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_killed_after_each_call_of_the_store_it_goes_on_to_the_same_bytes(desk, lives, monkeypatch, where):
    monkeypatch.setattr(journal, "_SAVE_S", -1.0)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # the machine does not die here, only drivers
    desk.write(some_rows(11))

    def store_of(bucket, name):
        if where == "local":
            return LocalStore(str(desk.folder / f"{name}.parts"))
        return without_waiting(bucket, f"bucket://b/{name}.parts")

    def read(bucket, name):
        return (
            desk.results(name)
            if where == "local"
            else (bucket.objects[f"b/{name}"], bucket.objects[f"b/{name[0]}.errors.jsonl"])
        )

    def run(bucket, name, store):
        errors = None if where == "local" else f"bucket://b/{name[0]}.errors.jsonl"
        output = name if where == "local" else f"bucket://b/{name}"
        return desk.run(output, FakeAnswerer(window=6), store, day=DAY, part_rows=4, errors=errors)

    plain = Bucket()
    counting = DyingStore(store_of(plain, "p.jsonl"))
    run(plain, "p.jsonl", counting)
    expected = read(plain, "p.jsonl")
    assert counting.num_calls > 40
    for at in range(1, counting.num_calls + 1):
        bucket, name = Bucket(), "q.jsonl"
        with pytest.raises(Killed):
            run(bucket, name, DyingStore(store_of(bucket, name), at))
        summary = run(bucket, name, store_of(bucket, name))
        assert summary.rows == 11 and read(bucket, name) == expected, at
        for path in desk.folder.glob("q.*"):
            path.unlink() if path.is_file() else [one.unlink() for one in path.iterdir()]


def test_what_has_ended_is_not_computed_again_though_its_part_is_not_whole(desk, lives, monkeypatch):
    monkeypatch.setattr(journal, "_SAVE_S", -1.0)
    first, second = FakeAnswerer(window=43, before=killing_at("c20")), FakeAnswerer()
    with pytest.raises(Killed):
        desk.run(answerer=first, part_rows=100)
    summary = desk.run(answerer=second, part_rows=100)
    assert set(first.answered) & set(second.answered) == set() and len(first.answered) + len(second.answered) == 35
    assert summary.skipped == len(first.answered) + 8
    assert not list((desk.folder / "out.jsonl.parts").glob("journal-*"))


# Object stores


@pytest.mark.parametrize("seed", range(6))
def test_faults_of_an_object_store_lose_and_double_nothing(desk, seed):
    desk.run("plain.jsonl", day=DAY)
    bucket = Bucket(now_and_then(seed, 0.25))

    def run():
        return desk.run(
            "bucket://b/out.jsonl", None, without_waiting(bucket), errors="bucket://b/out.errors.jsonl", day=DAY
        )

    for _ in range(5):  # eight faults in a row end a run, as they should
        with contextlib.suppress(ValueError):
            assert run().completed == 35
            break
    assert (bucket.objects["b/out.jsonl"], bucket.objects["b/out.errors.jsonl"]) == desk.results("plain.jsonl")


def test_a_store_that_fails_for_long_ends_the_run_by_name_and_the_next_one_goes_on(desk, lives):
    desk.run("plain.jsonl", day=DAY)
    bucket = Bucket()

    def run(answerer=None):
        return desk.run("bucket://b/out.jsonl", answerer, without_waiting(bucket), errors="bucket://b/e", day=DAY)

    def out_of_order(row):
        if row.number > 30:
            bucket.fault = lambda call, path: "503"

    with pytest.raises(ValueError, match=r"failed 8 times, at last with OSError: 503 .* start the same command again"):
        run(FakeAnswerer(window=2, before=out_of_order))
    bucket.fault = lambda call, path: None
    summary = run()
    assert summary.skipped >= 24 and summary.completed == 35
    assert (bucket.objects["b/out.jsonl"], bucket.objects["b/e"]) == desk.results("plain.jsonl")


def test_what_is_torn_while_it_is_created_is_written_again_and_what_another_wrote_stays():
    bucket, faults = Bucket(), ["torn", None, None, "timeout after", None]
    store = without_waiting(bucket)
    bucket.fault = lambda call, path: faults.pop(0) if faults else None
    assert store.create("x", b"one two three") and bucket.objects["b/out.jsonl.parts/x"] == b"one two three"
    assert store.create("x", b"one two three") and not store.create("x", b"something else")
    assert bucket.objects["b/out.jsonl.parts/x"] == b"one two three"


@pytest.mark.parametrize("raised", [ValueError, Killed])
def test_an_upload_that_is_broken_off_leaves_what_was_there(raised):
    bucket = Bucket()
    bucket.objects["b/out.jsonl"] = b"the whole of it"

    def broken():
        yield b"the wh"
        raise raised("no more")

    with pytest.raises(raised):
        without_waiting(bucket).publish("bucket://b/out.jsonl", broken)
    gc.collect()
    assert bucket.objects["b/out.jsonl"] == b"the whole of it"


def test_plain_filesystems_take_an_upload_too(tmp_path):
    local = fsspec.filesystem("file", auto_mkdir=True)
    path = tmp_path / "out.jsonl"
    store = ObjectStore(local, str(tmp_path / "parts"), pause=lambda seconds: None)
    store.publish(str(path), lambda: [b"one ", b"two"])
    with pytest.raises(ZeroDivisionError):
        store._upload(str(path), lambda: (bytes([1 // at]) for at in (1, 0)))
    assert path.read_bytes() == b"one two"
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    assert ObjectStore(memory, "memory://b/parts")._upload("memory://b/out", lambda: [b"one"]) == 3
    assert memory.cat("/b/out") == b"one"


def test_a_driver_that_was_taken_over_while_it_publishes_leaves_what_the_other_one_wrote(desk, lives):
    desk.run("plain.jsonl", day=DAY)
    bucket, others = Bucket(), []

    def run(answerer=None):
        return desk.run("bucket://b/out.jsonl", answerer, without_waiting(bucket), errors="bucket://b/e", day=DAY)

    def stall(call, path):
        uploads = [one for one in bucket.calls if one == ("put", "b/e")]
        if call == "get" and path.endswith("part-00003.jsonl") and uploads and not others:
            others.append(None)
            others.append(run())

    bucket.fault = stall
    with pytest.raises(ValueError, match="has taken this job over"):
        run()
    assert others[1].completed == 35
    assert (bucket.objects["b/out.jsonl"], bucket.objects["b/e"]) == desk.results("plain.jsonl")


def test_a_torn_part_is_made_again(desk, lives):
    bucket = Bucket()
    store = without_waiting(bucket)

    def run(answerer=None):
        return desk.run("bucket://b/out.jsonl", answerer, store, errors="bucket://b/e", day=DAY)

    with pytest.raises(Killed):
        run(FakeAnswerer(window=2, before=killing_at("c30")))
    name = "b/out.jsonl.parts/part-00001.jsonl"
    bucket.objects[name] = bucket.objects[name][:-5]
    assert run().completed == 35
    with pytest.raises(Killed):
        desk.run(answerer=FakeAnswerer(window=2, before=killing_at("c30")))
    part = desk.folder / "out.jsonl.parts/part-00001.jsonl"
    part.write_bytes(part.read_bytes().replace(b"batch_req", b"batch_rEq"))
    with pytest.raises(ValueError, match=r"part-00001\.jsonl: is not what was written; remove it"):
        desk.run()


def test_what_was_half_written_is_swept_up(desk):
    parts = desk.folder / "out.jsonl.parts"
    parts.mkdir()
    (parts / ".tmp-of-a-driver-that-was-killed").write_text("half")
    desk.run()
    assert not list(parts.glob(".tmp*"))


def test_a_store_that_cannot_create_only_if_absent_is_refused(desk):
    with pytest.raises(ValueError, match="overwrites what should be created only if absent"):
        without_waiting(Bucket(creates=False))


def test_the_names_of_error_files():
    assert default_errors("/a.b/answers.jsonl") == "/a.b/answers.errors.jsonl"
    assert default_errors("s3://bucket/x/answers") == "s3://bucket/x/answers.errors"
