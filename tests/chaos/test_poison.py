"""R8, R18: requests that kill a rank each time, and requests that give NaN: only they fail.

CHAOS_NANS=40 python -m pytest -m soak tests/chaos/test_poison.py
"""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.faults import Spell
from tests.chaos.scenes import Say, poison, scene, sicken
from tests.chaos.serving import App, parameter

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("act", ["hang", "freeze", "raise", "exit", "segfault"])
def test_what_one_request_does_to_a_rank_ends_with_it(app: App, act: str, tell: Say, show: Any) -> None:
    """A hang with and without heartbeats, an exception, and two deaths, at each point of a step."""
    rows, problems = list[dict[str, Any]](), list[str]()
    for rank, point in ((0, "before"), (1, "inside"), (2, "inside"), (3, "after")):
        with scene(app, seed=rank) as play:
            play.people.circle(play.asked["stream"], 8)
            deed = poison(play, Spell(act, rank, at=rank, point=point), "engine_failure")
        tell(f"{deed}")
        rows.append({"act": act, "rank": rank, "point": point, "rebuilds": deed.rebuilds, "seconds": deed.seconds})
        problems += deed.problems + play.problems
    show(f"R8: a request that makes a rank {act}", rows)
    assert problems == []
    assert max(row["rebuilds"] for row in rows) <= 3


def test_nan_never_leaves(app: App, folder: Path, tell: Say, show: Any) -> None:
    chance, count, problems = random.Random(18), int(parameter("CHAOS_NANS", 40)), list[str]()
    epoch = app.epoch()
    with scene(app) as play:
        play.people.circle(play.asked["stream"], 8)
        for number in range(count):
            spell = Spell("nan", chance.randrange(4), chance.randrange(30), once=number)
            found = sicken(play, spell, folder)
            problems += found
            tell(f"{number + 1}/{count}: rank {spell.rank}, token {spell.at}: {found or 'only this request failed'}")
    row = {"injected": count, "problems": len(problems), "others": play.num_checked, "harmed": len(play.problems)}
    show("R18: NaN in the activations of one request", [row | {"rebuilds": app.epoch() - epoch}])
    assert problems + play.problems == []
