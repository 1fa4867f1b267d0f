"""The fault kit in short, on one served gang of 2 x 2 ranks: a kill, a hang, a request that kills, and NaN."""

import random
import re
from pathlib import Path
from signal import SIGSTOP

import pytest

from tests.chaos.faults import Spell
from tests.chaos.scenes import Say, Script, poison, rehearse, scene, sicken, strikes, usual_crowd
from tests.chaos.serving import App

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def script(app: App) -> Script:
    return rehearse(app, max_tokens=(40, 120), share=2)


def test_nothing_is_lost_when_ranks_are_killed_or_stopped(app: App, script: Script, tell: Say) -> None:
    chance, before = random.Random(0), app.cluster()
    with scene(app, script) as play:
        usual_crowd(play)
        (kill,) = strikes(play, 1, chance, tell)
        (stop,) = strikes(play, 1, chance, tell, SIGSTOP)
    assert play.problems == []
    assert play.num_checked >= 12
    assert f"rank {stop.rank}" in app.failures()[stop.epoch]
    assert stop.noticed_s < 5.0
    after = app.cluster()
    assert (after["replica"], after["epoch"]) == (before["replica"], before["epoch"] + 2)
    stays = [was["pid"] == now["pid"] for was, now in zip(before["ranks"], after["ranks"], strict=True)]
    assert stays == [rank not in (kill.rank, stop.rank) for rank in range(4)]
    assert re.search(r'gang_rebuilds_total\{cause="silent".*\} 1', app.get("/metrics").text)


def test_a_request_that_kills_fails_alone(app: App, script: Script) -> None:
    with scene(app, script) as play:
        play.people.circle(play.asked["stream"], 8)
        deed = poison(play, Spell("exit", rank=2, at=3, point="inside"), "engine_failure")
    assert play.problems + deed.problems == []
    assert 1 <= deed.rebuilds <= 3


def test_nan_never_leaves(app: App, script: Script, folder: Path) -> None:
    with scene(app, script) as play:
        play.people.circle(play.asked["stream"], 8)
        spells = [Spell("nan", rank, at, once=number) for number, (rank, at) in enumerate([(0, 0), (1, 5), (3, 2)])]
        problems = [problem for spell in spells for problem in sicken(play, spell, folder)]
    assert play.problems + problems == []
