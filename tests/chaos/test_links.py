"""R5: the link between two nodes is cut: found in seconds, and nothing of the old epoch counts once it is whole again.

    CHAOS_CUT_S=8 python -m pytest -m soak tests/chaos/test_links.py

Two Ray nodes on this machine, in namespaces (tests/node_kit.py); one stage on each.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.scenes import Say, has_noticed, scene, usual_crowd
from tests.chaos.serving import App, arguments, parameter
from tests.node_kit import Nodes, why_not
from tests.serving import until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
PLACEMENT = {"cpus_per_rank": 0.25, "cpus_per_replica": 1.0, "strategy": "STRICT_SPREAD", "wait_s": 120.0}


@pytest.mark.parametrize("cut_s", [8.0])
def test_a_cut_link_is_found_and_what_is_old_stays_out(tmp_path: Path, cut_s: float, tell: Say, show: Any) -> None:
    cut_s = parameter("CHAOS_CUT_S", cut_s)
    with Nodes(tmp_path, 2) as nodes:
        for number, cpus in ((0, 2), (1, 1)):  # the replica is on the head
            nodes.start_ray(number, cpus)
        nodes.wait_for_ray(0, 1)
        server = nodes.serve(arguments((2, 2), placement=PLACEMENT))
        tell(f"serves after {server.wait_until_ready():.1f} s")
        app = App(server.url, nodes[0].root("/tmp/ray/session_latest/logs"))
        with scene(app) as play:
            usual_crowd(play)
            play.wait_until_all_speak()
            epoch, old_pids = app.epoch(), app.pids()
            cut = nodes.cut(1)
            until(lambda: has_noticed(app, epoch), within_s=60)
            found_s = time.monotonic() - cut
            tell(f"found after {found_s:.2f} s: {app.failures()}")
            time.sleep(max(0.0, cut + cut_s - time.monotonic()))
            mended = nodes.mend(1)
            until(lambda: app.epoch() > epoch and app.is_ready(), every_s=0.05)
            back = time.monotonic()
            play.wait_until_all_speak()
            longest_stall_s, state = play.longest_stall_s(cut, back), app.cluster()
    row = {"cut_s": mended - cut, "found_s": found_s, "ready_after_mending_s": back - mended}
    row |= {"longest_stall_s": longest_stall_s, "epochs": state["epoch"] - epoch, "requests": play.num_checked}
    row["processes kept"] = len(set(old_pids) & {rank["pid"] for rank in state["ranks"]})
    show("R5: a link between two nodes is cut", [row])
    assert play.problems == []
    assert found_s < 10
