"""The head dies and starts again: without storage for Ray's own state, and with it.

    python -m pytest -m soak tests/local_ray/test_head_restart.py

The head takes no rank: replica and stage 0 are on node 1, where the clients ask too, and stage 1 is on node 2.
"""

import time
from pathlib import Path

import pytest

from tests.local_ray.spread import Tell, arguments, begun, body
from tests.node_kit import Nodes, Serving, Stream, why_not
from tests.serving import ROOT

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
AWAY_S = 5.0  # the head is off for so long


def start(nodes: Nodes) -> Serving:
    """The other two nodes, and the demo over them."""
    for number, cpus in ((1, 2), (2, 1)):
        nodes.start_ray(number, cpus)
        nodes.wait_for_ray(number)
    server = nodes.serve(arguments(ROOT / "configs/demo", (2, 2)), door=1)
    server.wait_until_ready()
    return server


def restart_head(nodes: Nodes) -> float:
    """Returns when it died (monotonic seconds)."""
    moment = nodes[0].kill()
    time.sleep(AWAY_S)
    nodes.start_ray(0, cpus=0)
    nodes.wait_for_ray(0)
    return moment


def test_without_storage_everything_ends_and_has_to_be_served_anew(tmp_path: Path, tell: Tell) -> None:
    with Nodes(tmp_path, 3) as nodes:
        nodes.start_ray(0, cpus=0)
        nodes.wait_for_ray(0)
        streams = begun(start(nodes))
        moment = restart_head(nodes)
        away_s = time.monotonic() - moment
        for number in (1, 2):
            nodes[number].wait(400)  # the new head does not know them: Ray ends them, as a pod's restart needs
        ended_s = time.monotonic() - moment
        for stream in streams:
            stream.join(60)
        whole = sum(stream.is_done for stream in streams)
        assert all(stream.is_done or stream.failure for stream in streams), "no stream ends as if it were whole"
        server = start(nodes)
        served_s = time.monotonic() - moment
        assert Stream(server.url, body(0)).text()
        tell(
            f"head killed, back after {away_s:.1f} s, state in memory: the other nodes ended after {ended_s:.1f} s, "
            f"{whole} of {len(streams)} streams had ended by then, the others broke; deployed again, it served after "
            f"{served_s:.1f} s"
        )


def test_with_storage_streams_go_on_and_so_does_recovery(tmp_path: Path, tell: Tell) -> None:
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    with Nodes(tmp_path, 3, storage) as nodes:
        nodes.start_ray(0, cpus=0)
        nodes.wait_for_ray(0)
        server = start(nodes)
        golden = [stream.text() for stream in begun(server)]
        before = server.cluster()
        streams = begun(server)
        moment = restart_head(nodes)
        away_s = time.monotonic() - moment
        assert [stream.text() for stream in streams] == golden
        longest_s = max(stream.longest_pause_s(moment) for stream in streams)
        after = server.cluster()
        assert (after["replica"], after["epoch"]) == (before["replica"], before["epoch"])
        assert [rank["pid"] for rank in after["ranks"]] == [rank["pid"] for rank in before["ranks"]]

        streams = begun(server)
        nodes.run(2, "kill", "-9", str(after["ranks"][2]["pid"]))
        assert [stream.text() for stream in streams] == golden, "a rank is lost under the new head"
        assert server.cluster()["epoch"] > before["epoch"]
        tell(
            f"head killed, back after {away_s:.1f} s, state in RocksDB: {len(streams)} streams went on, longest pause "
            f"{longest_s:.1f} s; a rank that was lost afterwards came back"
        )
