"""Lost gangs: who ended an epoch, which request does so, and that everything else goes on, to the last id the same."""

import os
import random
import subprocess
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from actors.decisions.failure.culprit import (
    Complaint,
    CrashReport,
    RankProgress,
    revise_verdict,
    verdict_on_complaints,
    verdict_on_deaths,
    verdict_on_hang,
    verdict_on_silence,
)
from actors.decisions.failure.quarantine import Quarantine
from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.black_box import CrashFile, collect_crash_report
from actors.remote.engine import Engine
from actors.remote.meeting import Loaded, check_substitutions
from actors.words.errors import EngineStopped, GangFailure, GangLost, Verdict
from actors.words.executor import Revival
from actors.words.messages import NOT_A_NUMBER, Request, SamplingParams, Substitution
from tests.fakes.fake_executor import FakeExecutor, logprobs_of, next_id

GREEDY = SamplingParams(0.0)
SETTINGS = SchedulerSettings(block_size=4, max_num_seqs=16, max_num_batched_tokens=64, num_lanes=2, depth=2)
NUM_BLOCKS = 64


# -- who ended it ------------------------------------------------------------------------------------------------


def test_of_those_who_complain_the_one_furthest_behind_is_the_culprit() -> None:
    """Ranks of two stages with two shards; all others wait for what rank 1 never reached."""
    said = [
        Complaint(2, 7, "neighbor gone", op=3),
        Complaint(0, 7, "aborted", op=12),
        Complaint(1, 7, "own error", op=11),
        Complaint(3, 8, "neighbor gone"),
    ]
    for _ in range(20):
        random.shuffle(said)
        assert verdict_on_complaints(said, 2) == Verdict("failed", "own error", (1,), 7)
    said.append(Complaint(3, 6, "the last stage, one step behind"))
    assert verdict_on_complaints(said, 2).ranks == (3,)
    said[-1] = Complaint(3, 6, "neighbor gone", is_echo=True)  # what was under way to it went with its neighbor
    assert verdict_on_complaints(said, 2).ranks == (1,)


def test_in_a_hang_the_silent_come_first_then_step_stage_and_collective() -> None:
    progress_by_rank = {rank: RankProgress(100.0, 9, 40) for rank in range(4)}
    progress_by_rank[1] = RankProgress(100.0, 9, 39)
    verdict = verdict_on_hang(9, progress_by_rank, 2, now=100.5)
    assert (verdict.cause, verdict.ranks, verdict.step, verdict.is_from_within) == ("hung", (1,), 9, True)
    progress_by_rank[3] = RankProgress(97.9, 9, 40)
    verdict = verdict_on_hang(9, progress_by_rank, 2, now=100.5)
    assert (verdict.cause, verdict.ranks, verdict.is_from_within) == ("silent", (3,), False)
    assert verdict_on_silence(progress_by_rank, 100.5, 3.0) is None


def test_crash_reports_tell_a_crash_from_a_kill() -> None:
    killed = verdict_on_deaths([Complaint(2, 5, "rank 2 died"), Complaint(0, 5, "rank 0 died")])
    assert (killed.cause, killed.ranks, killed.is_from_within) == ("killed", (0, 2), False)
    left = {2: CrashReport(11, ""), 0: CrashReport(11, "")}
    assert revise_verdict(killed, {}, left) == killed
    left[0] = CrashReport(12, "Fatal Python error: Aborted\nstacks")
    verdict = revise_verdict(killed, {}, left)
    assert (verdict.cause, verdict.ranks, verdict.step) == ("crashed", (0,), 12)
    assert verdict.reason == "rank 0 ended itself: Fatal Python error: Aborted"
    noticed = Verdict("failed", "rank 1 lost its neighbor", (1,), 11)
    assert revise_verdict(noticed, {0: "rank 0 died"}, {}) == Verdict("killed", "rank 0 died", (0,))
    assert revise_verdict(noticed, {}, {}) == noticed


def test_who_fell_silent_in_a_step_may_have_been_frozen_by_it() -> None:
    silent = Verdict("silent", "nothing is heard from rank 1, 2", (1, 2))
    assert revise_verdict(silent, {}, {}) == silent  # their node is gone
    assert not revise_verdict(silent, {}, {1: CrashReport(-1, "")}).is_from_within  # between steps
    found = revise_verdict(silent, {}, {1: CrashReport(-1, ""), 2: CrashReport(7, ""), 0: CrashReport(3, "")})
    assert (found.cause, found.ranks, found.step, found.is_from_within) == ("silent", (1, 2), 7, True)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os._exit(3)", r"os._exit(3)"),
        ("import ctypes; ctypes.string_at(0)", "Fatal Python error: Segmentation fault"),
        ("os.abort()", "Fatal Python error: Aborted"),
        ("os.kill(os.getpid(), 9)", ""),
        ("time.sleep(60)", ""),  # collecting its crash report ends it
    ],
)
def test_a_black_box_tells_how_a_process_ended_and_in_which_step(end: str, words: str, tmp_path) -> None:
    code = f"""
import os, time
from actors.remote.black_box import BlackBox
box = BlackBox()
box.enter(41)
box.enter(42)
print(box.crash_file.pid, box.crash_file.started, box.crash_file.path, flush=True)
{end}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None
    pid, started, path = process.stdout.readline().split()
    if "sleep" not in end:
        process.wait(20)
    left = collect_crash_report(CrashFile(int(pid), int(started), path))
    assert left is not None
    assert left.step == 42
    assert left.text.splitlines()[:1] == ([words] if words else [])
    process.wait(20)
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()
    assert not list(tmp_path.iterdir())
    assert collect_crash_report(CrashFile(os.getpid(), 1, path)) is None  # another process by now: it is left alone


# -- whose request it was ----------------------------------------------------------------------------------------


def test_two_deaths_in_a_row_make_suspects_and_one_alone_a_culprit() -> None:
    quarantine, num_ids = Quarantine(), {"poison": 3, "a": 7, "b": 2, "elsewhere": 1}
    assert quarantine.death({"poison": 3, "a": 7, "b": 2}, num_ids) is None
    assert quarantine.suspects == {}
    num_ids["b"] = 3  # it has gained an id between, and poison one that had been lost with the ranks
    assert quarantine.death({"poison": 3, "a": 7, "b": 3}, num_ids) is None
    assert quarantine.suspects == {"poison": 3, "a": 7}
    num_ids["a"] = 8  # ran alone, and was cleared
    assert quarantine.death({"poison": 3}, num_ids) == "poison"
    assert quarantine.suspects == {}


def test_being_alone_by_chance_is_not_enough_and_absence_ends_a_row() -> None:
    quarantine, num_ids = Quarantine(), {"a": 4}
    assert quarantine.death({"a": 4}, num_ids) is None
    assert quarantine.death({}, num_ids) is None  # not in the culprit's step this time
    assert quarantine.death({"a": 4}, num_ids) is None
    assert quarantine.suspects == {}
    assert quarantine.death({"a": 4}, num_ids) is None
    assert quarantine.death({"a": 4}, num_ids) == "a"
    assert quarantine.death({"a": 4}, {}) is None  # it has ended


# -- the engine --------------------------------------------------------------------------------------------------


class Listener:
    """What was delivered, request by request."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.logprobs: dict[str, list] = {}
        self.prompt_logprobs: dict[str, list] = {}
        self.ends: dict[str, object] = {}
        self._changed = threading.Condition()

    def __call__(self, events) -> None:
        with self._changed:
            for event in events:
                assert event.request_id not in self.ends, "something follows the end"
                self.ids.setdefault(event.request_id, []).extend(event.token_ids)
                self.logprobs.setdefault(event.request_id, []).extend(event.logprobs)
                self.prompt_logprobs.setdefault(event.request_id, []).extend(event.prompt_logprobs)
                if event.finish_reason:
                    self.ends[event.request_id] = event
            self._changed.notify_all()

    def wait_for(self, condition) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=20)

    def all_of(self, names) -> None:
        self.wait_for(lambda: set(names) <= set(self.ends))


class Mortal(FakeExecutor):
    """Dies of what `fate` says to a step: a verdict, or None. Who hangs does so once the step's result is told."""

    def __init__(self, fate) -> None:
        super().__init__(block_size=SETTINGS.block_size)
        self._fate = fate
        self._hang = None

    def submit(self, step) -> None:
        verdict = self._hang if self.failure or self._hang else self._fate(step)
        is_late = verdict is not None and verdict.cause == "hung" and self._hang is None
        if self.failure is None and (verdict is None or is_late):
            super().submit(step)
        elif verdict is not None:
            self.fail(GangFailure(verdict.reason, verdict))
        self._hang = verdict if is_late else self._hang

    def wait(self, timeout_s=None):
        with self._changed:
            told = list(self._ready) if self._hang else []
            self._ready = deque() if told else self._ready
        return told or super().wait(timeout_s)


class Gangs:
    """Mortal executors, one an epoch."""

    def __init__(self, fate, refuse=lambda epoch: None) -> None:
        self.fate, self.refuse = fate, refuse
        self.listener = Listener()
        self.made = [Mortal(fate)]
        self.tries: list[tuple[int, str, bool]] = []
        self.may_revive = threading.Event()
        self.may_revive.set()
        self.engine = Engine(self.made[0], SETTINGS, NUM_BLOCKS, self.listener, self.revive)
        self.engine.start()

    def revive(self, epoch, verdict, is_fresh) -> Revival:
        self.tries.append((epoch, verdict.cause, is_fresh))
        assert self.may_revive.wait(20)
        self.refuse(epoch)
        self.made.append(Mortal(self.fate))
        return Revival(self.made[-1], verdict, {"start": 1.5})


@pytest.fixture
def gangs():
    made = []

    def make(*args, **options):
        made.append(Gangs(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


def expected(prompt, count, seed=0):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_id(ids, 1000, seed))
    return ids[len(prompt) :]


def test_every_stream_goes_on_with_the_ids_logprobs_and_ends_of_a_run_without_faults(gangs) -> None:
    """The gang is lost at random steps, killed from outside."""
    chance = random.Random(5)

    def fate(step):
        return Verdict("killed", "rank 1 died", (1,)) if step.entries and chance.random() < 0.06 else None

    world = gangs(fate)
    requests = {}
    for number in range(30):
        prompt = [number % 4] * 6 + list(range(number, number + 1 + number % 9))
        sampling = SamplingParams(
            1.0, number, logprobs=[None, 2][number % 2], prompt_logprobs=[None, None, 1][number % 3],
            min_tokens=number % 5,
        )  # fmt: skip
        stops = frozenset(range(0, 1000, 61))
        requests[f"r{number}"] = Request(f"r{number}", prompt, 5 + number % 20, sampling, stops)
    for request in requests.values():
        world.engine.add(request)
    world.listener.all_of(requests)
    for name, request in requests.items():
        ids, stops = list(request.prompt_ids), request.stop_token_ids
        reason = "length"
        while len(ids) - len(request.prompt_ids) < request.max_tokens:
            num_generated = len(ids) - len(request.prompt_ids)
            is_banned = num_generated < request.sampling.min_tokens
            ids.append(next_id(ids, 1000, request.sampling.seed, stops if is_banned else ()))
            if ids[-1] in stops and num_generated >= request.sampling.min_tokens:
                reason = "stop"
                break
        first = len(request.prompt_ids)
        assert world.listener.ids[name] == ids[first:]
        assert world.listener.ends[name].finish_reason == reason
        told = [logprobs_of(ids[:at], ids[at], 2, 1000) for at in range(first, len(ids))]
        assert world.listener.logprobs[name] == (told if request.sampling.logprobs else [])
        told = [logprobs_of(ids[:at], ids[at], 1, 1000) for at in range(1, first)]
        assert world.listener.prompt_logprobs[name] == (told if request.sampling.prompt_logprobs else [])
    stats = world.engine.stats
    assert stats.num_rebuilds["killed"] == len(world.tries) == world.engine.snapshot().epoch > 3
    assert stats.num_replayed > 3
    assert stats.recovery_s["start"].sum == 1.5 * len(world.tries)
    assert world.engine.snapshot().blocks_used == 0


def test_while_the_gang_comes_back_requests_wait_and_may_be_given_up(gangs) -> None:
    world = gangs(lambda step: time.sleep(0.002))
    world.may_revive.clear()
    world.engine.add(Request("long", [1, 2], 200, GREEDY))
    world.listener.wait_for(lambda: len(world.listener.ids.get("long", [])) > 3)
    world.made[0].fail(GangFailure("rank 0 died"))
    deadline = time.monotonic() + 20
    while not world.tries and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (world.engine.snapshot().state, world.engine.snapshot().epoch) == ("recovering", 1)
    world.engine.add(Request("late", [3], 5, GREEDY))
    world.engine.add(Request("given up", [4], 5, GREEDY))
    world.engine.finish("given up")
    world.listener.all_of(["given up"])  # at once, without a gang
    assert world.engine.snapshot().waiting == 2
    world.may_revive.set()
    world.listener.all_of(["long", "late"])
    assert world.listener.ids["long"] == expected([1, 2], 200)
    assert world.listener.ids["late"] == expected([3], 5)
    assert world.made[0].is_closed
    assert world.engine.snapshot().state == "ready"


@pytest.mark.parametrize("num_innocent", [0, 1, 8])
@pytest.mark.parametrize("at", [0, 3])  # ids that it generates before it does harm
def test_a_request_that_ends_ranks_costs_three_epochs_and_then_only_itself(gangs, num_innocent: int, at: int) -> None:
    """The harm is in its ids: whatever step brings position `at` of it to the ranks ends one."""
    poison = [66, 67, 68]
    harmful = 3 + at - 1  # position whose computation ends the rank
    rows = {}

    def fate(step):
        rows.update({opened.seq: opened.sampling.seed for opened in step.opened})
        for entry in step.entries:
            if rows[entry.seq] == 999 and entry.start <= harmful < entry.start + max(1, len(entry.ids)):
                return Verdict("crashed", "rank 1 ended itself", (1,), step.step)
        return None

    world = gangs(fate)
    for number in range(num_innocent):
        world.engine.add(Request(f"i{number}", [number, 5], 40, SamplingParams(1.0, number)))
    world.engine.add(Request("poison", poison, 20, SamplingParams(1.0, 999)))
    world.listener.all_of(["poison", *(f"i{number}" for number in range(num_innocent))])
    end = world.listener.ends["poison"]
    assert (end.finish_reason, end.code) == ("error", "ends_ranks")
    assert "ended the ranks" in end.error
    heard = world.listener.ids["poison"]
    assert heard == expected(poison, len(heard), 999)
    assert max(0, at - 1) <= len(heard) <= at  # the result of the step before may be lost with the ranks
    for number in range(num_innocent):
        assert world.listener.ids[f"i{number}"] == expected([number, 5], 40, number)
    assert len(world.tries) == 3
    assert not any(is_fresh for *_, is_fresh in world.tries)


@pytest.mark.parametrize("num_innocent", [0, 8])
@pytest.mark.parametrize("at", [0, 3])  # ids that it generates before it does harm
def test_a_request_that_does_harm_once_its_id_is_told_ends_too(gangs, num_innocent: int, at: int) -> None:
    """It gains an id in each epoch: the one that the fatal step brought."""
    rows = {}

    def fate(step):
        rows.update({opened.seq: opened.sampling.seed for opened in step.opened})
        for entry in step.entries:
            if rows[entry.seq] == 999 and entry.sample and entry.start + max(1, len(entry.ids)) >= 3 + at:
                return Verdict("hung", "rank 3 is furthest behind", (3,), step.step)
        return None

    world = gangs(fate)
    for number in range(num_innocent):
        world.engine.add(Request(f"i{number}", [number, 5], 40, SamplingParams(1.0, number)))
    world.engine.add(Request("poison", [66, 67, 68], 20, SamplingParams(1.0, 999)))
    world.listener.all_of(["poison", *(f"i{number}" for number in range(num_innocent))])
    assert world.listener.ends["poison"].code == "ends_ranks"
    heard = world.listener.ids["poison"]
    assert heard == expected([66, 67, 68], len(heard), 999)
    assert len(heard) == at + 3
    for number in range(num_innocent):
        assert world.listener.ids[f"i{number}"] == expected([number, 5], 40, number)
    assert len(world.tries) == 3


def test_kills_from_outside_count_against_nobody(gangs) -> None:
    deaths = iter(range(5))

    def fate(step):
        return Verdict("killed", "rank 1 died", (1,), step.step) if next(deaths, None) is not None else None

    world = gangs(fate)
    world.engine.add(Request("a", [1], 5, GREEDY))
    world.listener.all_of(["a"])
    assert world.listener.ends["a"].finish_reason == "length"
    assert [is_fresh for *_, is_fresh in world.tries] == [False, False, False, True, True]


def test_a_gang_that_never_gets_anywhere_is_given_up(gangs) -> None:
    world = gangs(lambda step: Verdict("killed", "rank 1 died", (1,)))
    world.engine.add(Request("a", [1], 5, GREEDY))
    world.listener.all_of(["a"])
    assert (world.listener.ends["a"].code, world.engine.snapshot().state) == ("gang_lost", "failed")
    with pytest.raises(EngineStopped):
        world.engine.add(Request("b", [1], 5, GREEDY))


def test_rejoining_that_fails_ends_in_a_fresh_start(gangs) -> None:
    def refuse(epoch):
        if epoch in (1, 2):
            raise GangFailure("rank 3 did not come")

    world = gangs(lambda step: None, refuse=refuse)
    world.made[0].fail(GangFailure("rank 0 died"))
    world.engine.add(Request("a", [1], 5, GREEDY))
    world.listener.all_of(["a"])
    assert world.listener.ids["a"] == expected([1], 5)
    assert world.tries == [(1, "killed", False), (2, "killed", False), (3, "killed", True)]


def test_an_attempt_in_which_nothing_ran_is_no_replay(gangs) -> None:
    def refuse(epoch):
        if epoch in (1, 2):
            raise GangFailure("rank 3 did not come")

    killed = Verdict("killed", "rank 0 died", (0,))
    world = gangs(lambda step: killed if (step.epoch, step.step) == (0, 3) else None, refuse=refuse)
    world.engine.add(Request("a", [1], 5, GREEDY))
    world.listener.all_of(["a"])
    assert world.listener.ids["a"] == expected([1], 5)
    assert len(world.tries) == 3
    assert world.engine.stats.num_replayed == 1


def test_a_gang_that_is_lost_for_good_is_not_tried_again(gangs) -> None:
    def refuse(epoch):
        raise GangLost("no node")

    world = gangs(lambda step: None, refuse=refuse)
    world.may_revive.clear()
    world.made[0].fail(GangFailure("rank 0 died"))
    world.engine.add(Request("a", [1], 5, GREEDY))
    world.may_revive.set()
    world.listener.all_of(["a"])
    assert world.listener.ends["a"].error == "the gang did not come back: no node"
    assert len(world.tries) == 1


def test_closing_while_the_gang_comes_back_ends_everything(gangs) -> None:
    world = gangs(lambda step: None)
    world.may_revive.clear()
    world.engine.add(Request("a", [1, 2], 500, GREEDY))
    world.made[0].fail(GangFailure("rank 0 died"))
    threading.Timer(0.2, world.may_revive.set).start()
    world.engine.close()
    assert world.listener.ends["a"].finish_reason == "error"
    assert all(executor.is_closed for executor in world.made)


def test_nan_fails_its_request_alone_and_the_ranks_are_checked_once(gangs) -> None:
    class Odd(Mortal):
        def _draw(self, row, ids):
            return NOT_A_NUMBER if row.sampling.seed == 13 and len(ids) >= 10 else super()._draw(row, ids)

    world = gangs(lambda step: None)
    world.made[0].__class__ = Odd
    shared = list(range(8))
    world.engine.add(Request("odd", shared, 20, SamplingParams(1.0, 13)))
    world.engine.add(Request("odd too", [2, 3], 20, SamplingParams(1.0, 13)))
    world.engine.add(Request("sound", [5], 30, GREEDY))
    world.listener.all_of(["odd", "odd too", "sound"])
    for name in ("odd", "odd too"):
        assert (world.listener.ends[name].finish_reason, world.listener.ends[name].code) == ("error", "numerical_error")
    assert world.listener.ids["odd"] == expected(shared, 2, 13)
    assert world.listener.ids["sound"] == expected([5], 30)
    assert world.made[0].num_checks == 1
    assert not world.tries
    before = world.engine.stats.num_prompt_cached
    world.engine.add(Request("alike", shared, 3, GREEDY))
    world.listener.all_of(["alike"])
    assert world.engine.stats.num_prompt_cached == before, "blocks with NaN are shared"


def test_shards_of_a_stage_that_substitute_otherwise_are_refused() -> None:
    def plan_of(num_shards: int) -> Any:
        shards = [SimpleNamespace(rank=rank, stage=0, shard=rank) for rank in range(num_shards)]
        return SimpleNamespace(shards=shards)

    alike = [Substitution("rms_norm", 3), Substitution("rotary", 0, "it differs by 0.5 of its size")]
    other = [Substitution("rms_norm", 3), Substitution("rotary", 0, "it differs by 0.7 of its size")]
    check_substitutions(plan_of(2), [Loaded(1, 1.0, alike), Loaded(1, 1.0, other)])
    fewer = [Substitution("rms_norm", 2)]
    message = (
        "stage 0: shard 1 substitutes otherwise than shard 0: rms_norm 2 times, not 3, rotary None times, not 0; give"
    )
    with pytest.raises(ValueError, match=message):
        check_substitutions(plan_of(2), [Loaded(1, 1.0, alike), Loaded(1, 1.0, fewer)])
