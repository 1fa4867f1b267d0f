"""R17: a random rank is killed every minute at half load; how much is answered beside a run without faults.

CHAOS_MINUTES=10 python -m pytest -m soak tests/chaos/test_goodput.py
"""

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from tests.chaos.histories import check
from tests.chaos.scenes import Say, Script, num_tokens, percentile, rehearse, scene, strike
from tests.chaos.serving import App, arguments, cluster, parameter, served

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]
FULL = 32  # requests at a time: as many as may run
PEAK_S = 20.0  # of full load, to know what half of it is
EVERY_S = 60.0


@dataclass
class Run:
    """One run at half load."""

    name: str
    seconds: float
    kills: int
    requests: int
    succeeded: int
    tokens_per_s: float  # of the answers that ended as they should
    latency_p50_s: float
    latency_p95_s: float
    latency_max_s: float


@pytest.mark.parametrize("layout", [(2, 2)], ids=["TP2 PP2"])
def test_goodput_under_a_kill_a_minute(layout: tuple[int, int], tell: Say, show: Any) -> None:
    duration_s = EVERY_S * parameter("CHAOS_MINUTES", 10)
    with cluster(), served(arguments(layout)) as app:
        script = rehearse(app)
        with scene(app, script) as play:
            play.people.circle([question for group in play.asked.values() for question in group], FULL)
            time.sleep(PEAK_S)
            per_s = sum(one.ended_at is not None for one in play.people.histories) / PEAK_S
        tell(f"full load: {per_s:.2f} requests a second")
        runs = [_run(name, app, script, per_s / 2, duration_s, tell) for name in ("fault-free", "a kill a minute")]
    free, killed = (run for run, _ in runs)
    rows = [asdict(run) | {"success": run.succeeded / run.requests} for run in (free, killed)]
    show(f"R17: goodput, with faults / without: {killed.tokens_per_s / free.tokens_per_s:.3f}", rows)
    assert rows[0]["success"] == 1.0, runs[0][1][:20]
    assert rows[1]["success"] >= 0.999, runs[1][1][:20]


def _run(name: str, app: App, script: Script, per_s: float, duration_s: float, tell: Say) -> tuple[Run, list[str]]:
    chance, num_ranks = random.Random(17), len(app.pids())
    turns = range(0 if name == "fault-free" else round(duration_s / EVERY_S))
    moments = [EVERY_S * turn + chance.uniform(0.0, EVERY_S) for turn in turns]
    kills = 0
    with scene(app, script, seed=17) as play:
        began = time.monotonic()
        play.people.arrive([question for group in play.asked.values() for question in group], per_s)
        while (passed_s := time.monotonic() - began) < duration_s:
            time.sleep(1.0)
            if kills < len(moments) and passed_s > moments[kills]:
                blow = strike(play, chance.randrange(num_ranks))
                kills += 1
                tell(f"{name}: rank {blow.rank} killed, ready after {blow.back_s:.2f} s")
            elif int(passed_s) % 20 == 0:
                tell(f"{name}: {passed_s:.0f} of {duration_s:.0f} s, {len(play.people.histories)} requests")
    histories = play.people.histories
    latencies = [one.ended_at - one.sent_at for one in histories if one.ended_at is not None]
    run = Run(
        name=name,
        seconds=duration_s,
        kills=kills,
        requests=len(histories),
        succeeded=sum(not check(one, play.golden[one.name]) for one in histories),
        tokens_per_s=num_tokens(histories, play.golden) / (max(one.ended_at or 0 for one in histories) - began),
        latency_p50_s=percentile(latencies, 0.5),
        latency_p95_s=percentile(latencies, 0.95),
        latency_max_s=max(latencies),
    )
    return run, play.problems
