"""The head dies and starts again: without storage for Ray's own state, and with it.

    python -m pytest -m soak tests/local_ray/test_head_restart.py

The head takes no rank: replica and stage 0 are on node 1, where the clients ask too, and stage 1 is on node 2.
"""

import time
from pathlib import Path

import pytest

from tests.local_ray.spread import Tell, arguments, begun
from tests.node_kit import Nodes, why_not
from tests.serving import ROOT, until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]


@pytest.mark.parametrize("is_kept", [False, True], ids=["memory", "rocksdb"])
def test_a_head_that_restarts(tmp_path: Path, is_kept: bool, tell: Tell) -> None:
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")} if is_kept else {}
    with Nodes(tmp_path, 3, storage) as nodes:
        nodes.start_ray(0, cpus=0)
        until(lambda: "Ray runtime started" in nodes[0].log.read_text())
        for number, cpus in ((1, 2), (2, 1)):
            nodes.start_ray(number, cpus)
        server = nodes.serve(arguments(ROOT / "configs/demo", (2, 2)), door=1)
        server.wait_until_ready()
        before = server.cluster()
        streams = begun(server)
        moment = nodes[0].kill()
        time.sleep(5)
        nodes.start_ray(0, cpus=0)
        for _ in range(90):
            time.sleep(1)
            state = "-"
            if server.status("/health") == 200:
                try:
                    now = server.cluster()
                    state = f"{now['replica'] == before['replica']} {now['state']} {now['epoch']}"
                except Exception as e:
                    state = repr(e)
            tell(
                f"{time.monotonic() - moment:.0f} s: {server.status('/ready')} {state} {sorted(nodes.alive())} "
                f"{[n._outer is not None and n._outer.poll() is None for n in nodes.nodes]} "
                f"{[(len(s.events), s.is_done, s.failure[:40]) for s in streams[:3]]}"
            )
