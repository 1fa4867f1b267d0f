"""R4: a stopped rank is found in seconds and named; and cores that are busy with other things are no reason for alarm.

CHAOS_STOPS=20 CHAOS_QUIET_S=600 python -m pytest -m soak tests/chaos/test_hangs.py
"""

import random
import subprocess
import sys
import time
from signal import SIGSTOP
from typing import Any

import psutil
import pytest

from tests.chaos.faults import SLOW_S, Spell
from tests.chaos.histories import golden_of
from tests.chaos.scenes import Say, median, scene, spelled, strikes, usual_crowd
from tests.chaos.serving import App, parameter

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]


def test_stopped_ranks_are_found_and_named(app: App, tell: Say, show: Any) -> None:
    with scene(app) as play:
        usual_crowd(play)
        blows = strikes(play, int(parameter("CHAOS_STOPS", 20)), random.Random(4), tell, SIGSTOP)
    told = app.failures()
    named = [blow for blow in blows if f"rank {blow.rank}" in told.get(blow.epoch, "")]
    found = [blow.noticed_s for blow in blows]
    row = {
        "stops": len(blows),
        "named": len(named),
        "found_p50_s": median(found),
        "found_max_s": max(found),
        "ready_max_s": max(blow.back_s for blow in blows),
        "requests": play.num_checked,
        "problems": len(play.problems),
    }
    show("R4: stopped ranks", [row])
    assert play.problems == []
    assert len(named) == len(blows), told
    assert max(found) < 5.0


def test_a_slow_rank_is_no_failure(app: App) -> None:
    epoch = app.epoch()
    with scene(app) as play:
        play.people.circle(play.asked["stream"], 8)
        slow = play.people.ask(spelled(play.asked["stream"][0], Spell("slow", rank=1), max_tokens=20))
    assert app.epoch() == epoch
    assert play.problems == []
    assert golden_of(slow).usage[1] == 20, "it is not sound to its end"
    assert slow.ended_at is not None and slow.ended_at - slow.sent_at >= 20 * SLOW_S, "the spell did not act"


def test_busy_cores_are_no_reason_for_alarm(app: App, tell: Say, show: Any) -> None:
    """Both cores are taken by programs that never rest, while the usual crowd asks."""
    duration_s, epoch = parameter("CHAOS_QUIET_S", 600), app.epoch()
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(psutil.cpu_count() or 1)]
    try:
        with scene(app) as play:
            usual_crowd(play)
            end = time.monotonic() + duration_s
            while time.monotonic() < end and app.epoch() in (epoch, -1):
                time.sleep(min(10.0, duration_s / 10))
                tell(f"epoch {app.epoch()}, {len(play.people.histories)} requests, load {psutil.getloadavg()[0]:.1f}")
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    row = {"seconds": duration_s, "alarms": app.epoch() - epoch, "requests": play.num_checked}
    show("R4: false alarms with both cores saturated", [row | {"problems": len(play.problems)}])
    assert app.epoch() == epoch, app.failures()
    assert play.problems == []
