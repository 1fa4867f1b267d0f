"""`make serve` as a person meets it: it serves, it says why it cannot, and it leaves nothing behind.

test_edge.py meets the whole demo, behind the default proxy. HAProxy is met here, with one rank: how many there are is
nothing to it, and three fewer start sooner. `-m soak` runs the whole demo behind both.
"""

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hostile.corpus import Target, check, corpus, send
from tests.local_ray.demo import (
    assert_checkpoints_defaults_hold,
    assert_four_ranks,
    assert_printed_command_works,
    assert_trained_answers,
    client_of,
)
from tests.serving import Run, until

PAGE = "https://chat.example.org"
ONE_RANK = {"parallel": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}}


def assert_what_is_odd_on_the_wire_is_answered(run: Run) -> None:
    """Never by a 5xx; and a body comes through that Serve's own proxy would lose."""
    target = Target("stagemesh-demo", 1024, 512, 64, 1024 * 1024, 60.0)
    for case in corpus(target):
        if case.id.startswith(("wire: ", "header: ")):
            answer = send(run.address, case)
            check(case, answer)
            assert answer.status == 200 or not case.id.endswith("as Java sends it")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ha_proxy", "changes"),
    [
        pytest.param(True, ONE_RANK | {"api": {"cors_origins": [PAGE]}}, id="haproxy, one rank"),
        pytest.param(True, {}, id="haproxy", marks=pytest.mark.soak),
        pytest.param(False, {}, id="python proxy", marks=pytest.mark.soak),
    ],
)
def test_the_demo_serves_until_ctrl_c(tmp_path: Path, ha_proxy: bool, changes: dict[str, dict[str, Any]]) -> None:
    with Run(tmp_path, ha_proxy=ha_proxy, **changes) as run:
        run.wait_for()
        assert_printed_command_works(run)
        assert_checkpoints_defaults_hold(run)
        with client_of(run) as client:
            assert_trained_answers(client, share=4 if changes else 1)
        if not changes:
            assert_four_ranks(run)
        if changes:
            preflight = {"origin": PAGE, "access-control-request-method": "POST"}
            assert (
                httpx.options(f"{run.url}/v1/models", headers=preflight).headers["access-control-allow-origin"] == PAGE
            )
        if ha_proxy:
            addresses = [run.listening().get(port) for port in (run.port, *run.doors.values())]
            assert addresses == ["127.0.0.1"] * 3
            assert_what_is_odd_on_the_wire_is_answered(run)
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 0, run.printed()
        run.assert_nothing_left()


@pytest.mark.timeout(300)
def test_what_does_not_fit_is_said_in_a_table(tmp_path: Path) -> None:
    with Run(tmp_path, "llama70b_tp8.yaml") as run:
        assert run.wait() == 1, run.printed()
        printed = run.printed()
        assert "stage 0" in printed
        assert "what would work" in printed
        assert "8 GPUs" in printed
        assert "Traceback" not in printed
        assert "starting Serve" not in printed
        run.assert_nothing_left()


@pytest.mark.timeout(300)
def test_two_interrupts_while_ray_starts_leave_nothing(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.wait_for("starting Ray")
        until(lambda: len(run.processes()) >= 3, every_s=0.05)  # Ray's first processes are there
        run.process.send_signal(signal.SIGTERM)
        run.wait_for("stopping")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() in (0, 130), run.printed()
        run.assert_nothing_left()
