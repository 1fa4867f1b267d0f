"""R1, R2: ranks are killed at random moments in three layouts, and every request ends as if nothing had happened.

CHAOS_KILLS=100 python -m pytest -m soak tests/chaos/test_kills.py
"""

import random
from typing import Any

import pytest

from tests.chaos.histories import read
from tests.chaos.scenes import Blow, Say, Scene, median, percentile, scene, strikes, usual_crowd
from tests.chaos.serving import arguments, cluster, cold_start_s, parameter, served

LAYOUTS = ((2, 1), (1, 2), (2, 2))
SPARES: dict[str, dict[str, Any]] = {"cold": {}, "spare": {"recovery": {"warm_spares": 1}}}

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]


REST_S = {"cold": 0.0, "spare": 6.0}  # a spare is there again after some seconds; what comes sooner is a cold start
DOUBLED = 0.1  # of the kills are followed by another while the gang is being rebuilt


@pytest.mark.parametrize("spares", SPARES)
def test_kills(spares: str, tell: Say, show: Any) -> None:
    count, rows, problems = int(parameter("CHAOS_KILLS", 100)), list[dict[str, Any]](), list[str]()
    with cluster():
        for turn, layout in enumerate(LAYOUTS):
            share = count // len(LAYOUTS) + (turn < count % len(LAYOUTS))
            tell(f"{layout[0]} x {layout[1]}, {spares}: {share} kills")
            starts = [cold_start_s(arguments((1, 1))), cold_start_s(arguments(layout))]
            with served(arguments(layout, **SPARES[spares])) as app, scene(app, seed=turn) as play:
                usual_crowd(play)
                blows = strikes(play, share, random.Random(turn), tell, doubled=DOUBLED, rest_s=REST_S[spares])
            problems += play.problems
            rows.append(_row(f"TP{layout[0]} PP{layout[1]} {spares}", blows, play, starts))
            tell(f"{rows[-1]}")
    show("R1, R2: kills of random ranks", rows)
    assert problems == []


def _row(name: str, blows: list[Blow], play: Scene, starts: list[float]) -> dict[str, Any]:
    stalls = [blow.stall_s for blow in blows if blow.second is None]
    return {
        "layout": name,
        "kills": len(blows) + sum(blow.second is not None for blow in blows),
        "requests": play.num_checked,
        "problems": len(play.problems),
        "pings": sum(read(one).num_pings for one in play.people.histories),
        "noticed_s": median([blow.noticed_s for blow in blows]),
        "stall_p50_s": percentile(stalls, 0.5),
        "stall_p95_s": percentile(stalls, 0.95),
        "stall_max_s": max(stalls),
        "double_max_s": max((blow.stall_s for blow in blows if blow.second is not None), default=0.0),
        "rank_start_s": starts[0],
        "gang_start_s": starts[1],
        "goal_s": starts[0] + 5,
    }
