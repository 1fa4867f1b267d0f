"""`stagemesh doctor` on Ray: the table of this machine, of two nodes with planted faults, and shards along NVLinks."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")
from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402

from actors.remote.actor_pool import ActorPool, RankActor, WorkerInfo  # noqa: E402
from actors.remote.black_box import CrashFile  # noqa: E402
from cluster.collectives.network import Place  # noqa: E402
from cluster.topology import Topology  # noqa: E402
from configs.config import Config  # noqa: E402
from deployments import cli  # noqa: E402
from tests.node_kit import PORT, Nodes, why_not  # noqa: E402
from tests.serving import until  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = "configs/demo.yaml"

pytestmark = pytest.mark.timeout(300)  # it waits for processes to start, on a machine that may be busy


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
def test_this_machine_is_well_and_its_links_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", DEMO, "--json"]) == 0
    printed = capsys.readouterr()
    assert "measuring the links" in printed.err, "progress is shown"
    said = json.loads(printed.out)
    found: dict[str, list[str]] = {}
    others = {"disk speed", "HTTP port", "shared memory", "environment"}
    for one in said["findings"]:
        found.setdefault(one["check"], []).append(one["found"])
        # What else runs here, what killed ranks have left and the shell's variables are not the test's
        assert one["judgement"] == "ok" or one["check"] in others, one
    expected = {"room for stages", "versions", "clock", "open files", "names", "room", "GPUs", "exchange", "hops"}
    assert found.keys() >= expected | others
    assert len(found["exchange"]) == 2 and all("2 shards: all-reduce of 8 KiB" in words for words in found["exchange"])
    assert len(found["hops"]) == 2 and "through 2 stages and back" in found["hops"][1]


# Shards along NVLinks


class OnGpus(RankActor):
    """A rank's process on a machine where NVLink joins 0-2, 2-1, 1-3 and 3-0."""

    def __init__(self, config: Config) -> None:
        """Imports nothing."""

    def info(self) -> None:  # type: ignore[override]
        """The test has its own."""

    def gpu_links(self, gpus: list[str]) -> list[list[int]] | None:
        if "unknown" in gpus:
            return None
        joined = {("0", "2"), ("2", "1"), ("1", "3"), ("3", "0")}
        return [[2 * ((a, b) in joined or (b, a) in joined) for b in gpus] for a in gpus]

    def call(self, method: str, *args: Any) -> float:
        assert method == "exchange_rate"
        return 21e9


@pytest.fixture(scope="module")
def bundle(cluster: None) -> Iterator[Any]:
    group = placement_group([{"CPU": 0.1}])
    assert group.wait(30)
    yield group
    remove_placement_group(group)


def settled(pool: ActorPool, infos: list[WorkerInfo]) -> list[str]:
    return pool.settle_devices(infos, lambda calls, what, ranks: ray.get(calls))


def pool_of(bundle: Any, require_nvlink: bool) -> tuple[ActorPool, list[WorkerInfo]]:
    placement = {"require_nvlink": require_nvlink, "cpus_per_rank": 0.01}
    config = Config.model_validate({"model": {"source": "none"}, "placement": placement})
    place = Place("node", "box", "eth0", "10.0.0.1")
    infos = [WorkerInfo(1, place, f"cuda:{index}", CrashFile(1, 0, ""), str(index)) for index in range(4)]
    return ActorPool(config, Topology(4, 1), bundle, "cpu", OnGpus), infos


def test_shards_take_gpus_along_the_links_and_slow_pairs_are_told(
    bundle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pool, infos = pool_of(bundle, require_nvlink=False)
    try:
        devices = settled(pool, infos)
        assert devices == ["cuda:0", "cuda:2", "cuda:1", "cuda:3"]
        with caplog.at_level(logging.WARNING):
            pool.tell_slow_links(lambda calls, what, ranks: ray.get(calls))
            pool.tell_slow_links(lambda calls, what, ranks: ray.get(calls))  # of another epoch
        (told,) = caplog.messages
        assert "no NVLink joins cuda:0 and cuda:1, cuda:2 and cuda:3" in told and "box (eth0, 10.0.0.1)" in told
        assert "21.0 GB/s" in told and "tensor_parallel_size" in told
        pool.replace(1)
        assert settled(pool, infos) == devices, "a successor takes its predecessor's"
    finally:
        pool.close()


def test_a_stage_that_only_pcie_joins_is_refused_where_that_is_asked(bundle: Any) -> None:
    pool, infos = pool_of(bundle, require_nvlink=True)
    try:
        with pytest.raises(ValueError, match=r"placement.require_nvlink: stage 0: .*cuda:0 and cuda:1.*label_selector"):
            settled(pool, infos)
        for gpu, why in (("unknown", "NVML does not answer"), (None, "ranks have no GPUs")):
            others = [replace(info, gpu=gpu) for info in infos]
            with pytest.raises(ValueError, match=f"placement.require_nvlink: stage 0: .*{why}"):
                settled(pool, others)
    finally:
        pool.close()


# Two nodes


def examined(nodes: Nodes) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """(Exit code, findings that are not ok by check) of the command on the head."""
    done = subprocess.run(
        nodes[0].inside(sys.executable, "-m", "deployments.cli", "doctor", DEMO, "--json"),
        env=nodes.environment | {"RAY_ADDRESS": f"{nodes[0].address}:{PORT}"},
        capture_output=True,
        text=True,
    )
    found: dict[str, list[dict[str, str]]] = {}
    for one in json.loads(done.stdout)["findings"]:
        if one["judgement"] != "ok":
            found.setdefault(one["check"], []).append(one)
    return done.returncode, found


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_faults_planted_on_a_node_are_each_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Nodes(tmp_path_factory.mktemp("nodes"), 2) as nodes:
        for number in (0, 1):
            nodes.start_ray(number, cpus=2)
        nodes.wait_for_ray(0, 1)
        code, found = examined(nodes)
        assert code == 0 and found.keys() <= {"disk speed", "clock"}, found

        source, changed = ROOT / "configs/units.py", "/tmp/units.py"
        nodes.run(0, "ip", "rule", "add", "to", nodes[1].address, "ipproto", "tcp", "dport", "31000", "prohibit")
        nodes.run(1, "mount", "-o", "remount,size=32m", "/dev/shm")
        nodes.run(1, "sh", "-c", "prlimit --pid $(pgrep -x raylet) --nofile=900:900")
        nodes.run(
            1,
            "sh",
            "-c",
            f"cp {source} {changed} && echo '# changed' >> {changed} && mount --bind {changed} {source}",
        )
        code, found = examined(nodes)
        assert code == 1
        (port,) = found["ports"]
        assert "node0" in port["where"].partition("→")[0] and "node1" in port["where"].partition("→")[2]
        assert f"port 31000 of {nodes[1].address}" in port["found"] and "NetworkPolicy" in port["remedy"]
        remedies = {"shared memory": "--shm-size", "open files": "ulimit -n", "versions": "one image"}
        for check, remedy in remedies.items():
            (fault,) = found[check]
            assert fault["judgement"] == "fail" and remedy in fault["remedy"], fault
            assert "node1" in fault["where"] or "node1" in fault["found"]

        nodes[1].kill()
        until(lambda: len(nodes.alive()) == 1, 120, every_s=1)
        nodes.start_ray(1, cpus=2, NCCL_SOCKET_IFNAME="mgmt0")
        nodes.wait_for_ray(0, 1)
        code, found = examined(nodes)
        (fault,) = found["interface"]
        assert code == 1 and "node1" in fault["where"] and "mgmt0" in fault["found"]
        assert "unset NCCL_SOCKET_IFNAME" in fault["remedy"]
