"""R5: the link between two nodes is cut: found in seconds, and nothing of the old epoch counts once it is whole again.

    CHAOS_CUT_S=8 python -m pytest -m soak tests/chaos/test_links.py

Two Ray nodes on this machine, each in a network namespace of its own (needs root); one stage on each.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.serve.environment import ENVIRONMENT
from tests.chaos.faults import TwoNodes
from tests.chaos.scenes import Say
from tests.chaos.serving import parameter
from tests.serving import ROOT

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not TwoNodes.are_possible(), reason="network namespaces need root and iproute2"),
]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
COMMON = ["--num-cpus", "4", "--num-gpus", "0", "--object-store-memory", "100000000"]
HEAD = ["--head", "--port", "6399", "--include-dashboard", "false"]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    """Two namespaces with a Ray node each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # nobody else is in there
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for key, value in (ENVIRONMENT | {"RAY_SERVE_ENABLE_HA_PROXY": "0"}).items():
        monkeypatch.setenv(key, value)
    folder = Path("/tmp/chaos_ray")  # short: it holds sockets
    with TwoNodes() as nodes:
        address = f"{nodes.addresses[0]}:6399"
        begin(nodes, 0, [*HEAD, "--temp-dir", str(folder)])
        begin(nodes, 1, ["--address", address])
        yield nodes


def begin(nodes: TwoNodes, node: int, options: list[str]) -> None:
    own = ["--node-ip-address", nodes.addresses[node]]
    command = [*nodes.inside(node), *RAY, "start", *own, *options, *COMMON]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cut_s", [8.0])
def test_a_cut_link_is_found_and_what_is_old_stays_out(nodes: TwoNodes, cut_s: float, tell: Say, show: Any) -> None:
    cut_s = parameter("CHAOS_CUT_S", cut_s)
    address = f"{nodes.addresses[0]}:6399"
    program = [sys.executable, "-u", "-m", "tests.chaos.cut_scene", address, nodes.addresses[0], str(cut_s)]
    with subprocess.Popen(
        [*nodes.inside(0), *program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line.rstrip())
            tell(lines[-1][:200])
    assert run.returncode == 0, "\n".join(lines[-40:])
    figure = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    show("R5: a link between two nodes is cut", [{k: v for k, v in figure.items() if not isinstance(v, (list, dict))}])
    assert figure["problems"] == []
    assert figure["found_s"] < 10.0
