"""One scene on two nodes, the link between them cut: runs inside the first node's network namespace; see test_links.

    ip netns exec NODE python -m tests.chaos.cut_scene RAY_ADDRESS NODE_ADDRESS CUT_S

Prints progress; the last line is JSON.
"""

import json
import sys
import time

from tests.chaos.faults import TwoNodes
from tests.chaos.scenes import has_noticed, scene, usual_crowd
from tests.chaos.serving import arguments, cluster, served
from tests.serving import until


def main(ray_address: str, node_address: str, cut_s: float) -> None:
    args = arguments((2, 2), placement={"cpus_per_rank": 0.25, "cpus_per_replica": 0.5, "strategy": "STRICT_SPREAD"})
    with cluster(ray_address, _node_ip_address=node_address), served(args) as app, scene(app) as play:
        print(
            f"serves after {app.cold_start_s:.1f} s on {sorted({r['node'] for r in app.cluster()['ranks']})}",
            flush=True,
        )
        usual_crowd(play)
        play.wait_until_all_speak()
        epoch, old_pids = app.epoch(), app.pids()
        cut = TwoNodes.cut()
        found_s = until(lambda: has_noticed(app, epoch), within_s=60)
        print(f"found after {found_s:.2f} s: {app.failures()}", flush=True)
        time.sleep(max(0.0, cut + cut_s - time.monotonic()))
        healed = TwoNodes.heal()
        print(f"healed after {healed - cut:.1f} s", flush=True)
        until(lambda: app.epoch() > epoch and app.is_ready(), every_s=0.05)
        back = time.monotonic()
        print(f"ready {back - healed:.1f} s after that, epoch {app.epoch()}", flush=True)
        play.wait_until_all_speak()
        longest_stall_s, told = play.longest_stall_s(cut, back), app.cluster()
    figure = {
        "cut_s": healed - cut,
        "found_s": found_s,
        "ready_after_healing_s": back - healed,
        "longest_stall_s": longest_stall_s,
        "epochs": told["epoch"] - epoch,
        "old_pids": len(set(old_pids) & {rank["pid"] for rank in told["ranks"]}),
        "requests": play.num_checked,
        "problems": play.problems[:20],
        "reasons": app.failures(),
    }
    print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
