"""`stagemesh doctor`: what is read from a node becomes a verdict and a remedy. Faults are real where that is cheap."""

import http.server
import json
import logging
import math
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray._private.thirdparty.pynvml as pynvml
from huggingface_hub import constants

from cluster.placement import nvml
from cluster.placement.interfaces import Interface, chosen
from cluster.placement.nvlink import order_along_links, unjoined_pairs
from cluster.topology import Topology
from configs.config import Config
from deployments.doctor import host, storage
from deployments.doctor.bucket import read_bucket
from deployments.doctor.cluster_findings import Way, cluster_findings, way_findings
from deployments.doctor.facts import SECTIONS, Asked, Bucket, Cuda, Disk, Hub, Limits, Network, NodeFacts, SharedMemory
from deployments.doctor.findings import Finding, fail, ok, warn, worst
from deployments.doctor.gpu_findings import gpu_findings
from deployments.doctor.host_findings import host_findings
from deployments.doctor.hub import read_hub
from deployments.doctor.link_findings import link_findings
from deployments.doctor.links import Layout, Measured, users_of
from deployments.doctor.nodes import NodeProbe
from deployments.doctor.probe import run_probe
from deployments.doctor.text import as_text
from deployments.serve.environment import ENVIRONMENT, lacking
from deployments.serve.replica import say_what_is_lacking
from tests.fakes.fake_nvml import FABRIC_HEALTHY, GIB, FakeGpu, FakeNvml, bare, bridged, hgx, pcie

ROOT = Path(__file__).resolve().parents[2]
HERE = Interface("eth0", "10.0.0.1")


def _has_namespaces() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "--mount", "true"]).returncode


def bad(findings: Iterator[Finding] | list[Finding]) -> list[Finding]:
    """Those that are not ok."""
    return [finding for finding in findings if finding.judgement != "ok"]


def node(**sections: Any) -> NodeFacts:
    return NodeFacts("one", "10.0.0.1", sections=sections)


def host_faults(**sections: Any) -> list[Finding]:
    return bad(host_findings(node(**sections), on_gpus=False, start_s=900.0, judge_environment=False))


# The environment of `make serve`


def test_the_replica_says_what_its_cluster_lacks_and_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    own = ENVIRONMENT | {"RAY_worker_niceness": "5"}  # another value is somebody's choice
    assert not lacking(own)
    del own["RAY_worker_niceness"]
    with caplog.at_level(logging.WARNING):
        say_what_is_lacking(own)
    (line,) = caplog.messages
    assert "RAY_worker_niceness=0" in line and "all ranks wait" in line


def test_the_doctor_judges_the_environment_of_a_cluster_that_others_started() -> None:
    own = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_worker_niceness"}
    found = node(environment=own | {"NCCL_P2P_DISABLE": "1", "NCCL_ALGO": "Tree", "NCCL_IB_DISABLE": "0"})
    faults = bad(host_findings(found, False, 900.0, judge_environment=True))
    assert [finding.judgement for finding in faults] == ["warn"] * 3
    assert "RAY_worker_niceness=0" in faults[0].remedy
    assert "unset NCCL_P2P_DISABLE" in faults[1].remedy and "unset NCCL_ALGO" in faults[2].remedy
    assert len(bad(host_findings(found, False, 900.0, judge_environment=False))) == 2


# GPUs, by NVML


def gpus_of(monkeypatch: pytest.MonkeyPatch, gpus: list[FakeGpu], **kept: Any) -> NodeFacts:
    """A node that NVML describes so."""
    fake = FakeNvml(gpus)
    monkeypatch.setattr(nvml, "pynvml", fake)
    found = nvml.read_gpus()
    assert not fake.is_open, "NVML is released"
    return NodeFacts("one", "10.0.0.1", sections={"gpus": found}, **kept)


def test_a_healthy_machine_of_eight_gpus_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    well = gpus_of(monkeypatch, hgx(), free_gpus=8.0)
    findings = list(gpu_findings(well, shards=8, require_nvlink=True))
    assert worst(findings) == "ok"
    assert [finding.check for finding in findings] == ["GPUs", "NVLink"]
    assert "8 x NVIDIA H100 80GB HBM3, driver 580.95.05" in findings[0].found
    assert "joins all 8 GPUs, 18 links" in findings[1].found


@pytest.mark.parametrize(
    ("what", "check", "judgement", "found", "remedy"),
    [
        ({"remapped": (1, 0, 1, 0)}, "GPU memory", "warn", "waits for a reset", "--gpu-reset"),
        ({"remapped": (1, 3, 1, 1)}, "GPU memory", "fail", "could not be replaced", "exchanged"),
        ({"uncorrected_errors": 2}, "GPU memory", "fail", "2 errors", "--gpu-reset"),
        ({"recovery_action": 2}, "GPU state", "fail", "asks for a recovery", "reboot the node"),
        ({"slowdowns": 0x40 | 0x4}, "GPU clocks", "warn", "too hot, by hardware", "cooling"),
        ({"pcie_width": 8}, "PCIe", "warn", "8 of 16 lanes", "riser"),
        ({"mig": True}, "MIG", "warn", "is split", "-mig 0"),
        ({"compute_mode": 3}, "GPU state", "fail", "compute mode", "-c DEFAULT"),
        (
            {"pids": (4242,), "used_bytes": 70 * GIB},
            "GPU users",
            "warn",
            "70.0 GiB by pid 4242",
            "CUDA_VISIBLE_DEVICES",
        ),
        ({"used_bytes": 9 * GIB}, "GPU users", "warn", "9.0 GiB", "CUDA_VISIBLE_DEVICES"),
        ({"links": [-1] * 17 + [None]}, "NVLink", "fail", "links 17 of 18 are down", "nvidia-smi nvlink"),
        ({"fabric": (2, 0)}, "NVLink fabric", "fail", "not complete", "nvidia-fabricmanager"),
        ({"fabric": (3, FABRIC_HEALTHY & ~3 | 1)}, "NVLink fabric", "warn", "bandwidth is degraded", "looked at"),
        ({"name": "NVIDIA H100 PCIe"}, "GPUs", "warn", "1 x NVIDIA H100 PCIe", "equal GPUs"),
    ],
)
def test_a_fault_of_one_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, what: dict[str, Any], check: str, judgement: str, found: str, remedy: str
) -> None:
    gpus = hgx()
    gpus[3] = FakeGpu(3, **what)
    (fault,) = bad(gpu_findings(gpus_of(monkeypatch, gpus, free_gpus=8.0), shards=8, require_nvlink=False))
    assert (fault.check, fault.judgement) == (check, judgement)
    assert found in fault.found and ("GPU 3" in fault.found or check == "GPUs") and remedy in fault.remedy


def test_gpus_that_ray_has_given_away_are_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = hgx()
    gpus[0].pids, gpus[1].pids = (1,), (2,)
    assert not bad(gpu_findings(gpus_of(monkeypatch, gpus, free_gpus=6.0), 8, False))
    assert bad(gpu_findings(gpus_of(monkeypatch, gpus, free_gpus=7.0), 8, False))


def test_gpus_that_only_pcie_joins_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = gpus_of(monkeypatch, pcie(2))
    (fault,) = bad(gpu_findings(apart, shards=2, require_nvlink=False))
    assert fault.judgement == "warn" and "0-1" in fault.found and "tensor_parallel_size" in fault.remedy
    assert bad(gpu_findings(apart, shards=2, require_nvlink=True))[0].judgement == "fail"
    assert not bad(gpu_findings(apart, shards=1, require_nvlink=True))


def test_a_node_without_gpus_fails_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "pynvml", FakeNvml([], error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert nvml.read_gpus() is None and nvml.links_between(["0", "1"]) is None
    none = node(gpus=None)
    assert worst(list(gpu_findings(none, None, False))) == "ok"
    assert worst(list(gpu_findings(none, 2, False))) == "fail"
    none.hosts_ranks = False  # a head
    assert not list(gpu_findings(none, 2, False))


def test_a_driver_that_is_ill_fails_where_ranks_need_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nvml, "pynvml", FakeNvml([], error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    ill = node(gpus=nvml.read_gpus())
    (fault,) = gpu_findings(ill, 2, False)
    assert fault.judgement == "fail" and "the driver: " in fault.found and "dmesg" in fault.remedy
    assert worst(list(gpu_findings(ill, None, False))) == "warn", "ranks on CPUs"
    assert nvml.links_between(["0", "1"]) is None and "NVML does not say" in caplog.text


def test_a_gpu_that_is_lost_fails_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = hgx()
    gpus[2].error = pynvml.NVML_ERROR_GPU_IS_LOST
    lost = gpus_of(monkeypatch, gpus, free_gpus=8.0)
    (fault,) = bad(gpu_findings(lost, 7, True))
    assert fault.judgement == "fail" and "GPU 2: GPU is lost" in fault.found
    assert [gpu.index for gpu in lost.sections["gpus"].gpus] == [0, 1, 3, 4, 5, 6, 7]
    gpus[2].error = pynvml.NVML_ERROR_NO_PERMISSION  # another container's
    assert not bad(gpu_findings(gpus_of(monkeypatch, gpus, free_gpus=7.0), 7, True))


def test_links_of_cards_without_a_bridge_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not bad(gpu_findings(gpus_of(monkeypatch, bare(4)), 1, False))
    assert not bad(gpu_findings(gpus_of(monkeypatch, bridged((0, 1), (2, 3))), 1, False))
    both = bridged((0, 1), (2, 3))
    both[0].links[3] = None
    (fault,) = bad(gpu_findings(gpus_of(monkeypatch, both), 1, False))
    assert fault.judgement == "fail" and "GPU 0" in fault.found
    both = bridged((0, 1), (2, 3))
    both[0].links, both[1].links = [None] * 12, [None] * 12
    assert not bad(gpu_findings(gpus_of(monkeypatch, both), 1, False))
    assert worst(list(gpu_findings(gpus_of(monkeypatch, both), 2, False))) == "warn"


def test_bridges_that_do_not_join_a_whole_stage_fail_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = gpus_of(monkeypatch, bridged((0, 1), (2, 3)))
    assert [worst(list(gpu_findings(pairs, shards, True))) for shards in (2, 4)] == ["warn", "fail"]
    pairs.hosts_ranks = False
    assert worst(list(gpu_findings(pairs, 4, True))) == "warn"


# Numbering along NVLinks


def test_links_are_found_by_the_names_that_ray_has_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "pynvml", FakeNvml(bridged((0, 2), (1, 3))))
    assert nvml.links_between(["0", "GPU-00000002", "3"]) == ((0, 4, 0), (4, 0, 0), (0, 0, 0))
    for unknown in ("7", "GPU-99999999"):
        assert nvml.links_between(["0", unknown]) is None, "a GPU that NVML does not know"


def test_shards_are_numbered_along_the_links() -> None:
    ring = [[0, 0, 2, 1], [0, 0, 1, 2], [2, 1, 0, 0], [1, 2, 0, 0]]  # 0-2 2-1 1-3 3-0 have links, 0-1 and 2-3 none
    order = order_along_links(ring)
    assert all(ring[a][b] for a, b in zip(order, (*order[1:], order[0]), strict=True))
    assert unjoined_pairs(ring) == [(0, 1), (2, 3)]
    alike = [[0 if a == b else 18 for b in range(8)] for a in range(8)]
    assert order_along_links(alike) == tuple(range(8)) and not unjoined_pairs(alike)
    assert order_along_links([[0]]) == (0,)


# Machines: the findings


def test_what_a_machine_lacks_is_named_with_its_remedy() -> None:
    (files,) = host_faults(limits=Limits(512, -1))
    assert files.judgement == "fail" and "ulimit -n 65536" in files.remedy
    assert host_faults(limits=Limits(4096, -1))[0].judgement == "warn"
    (shm,) = host_faults(shm=SharedMemory(64 << 20, 60 << 20, (), 0))
    assert shm.judgement == "fail" and "--shm-size" in shm.remedy
    (stale,) = host_faults(shm=SharedMemory(GIB * 8, GIB, ("nccl-a", "nccl-b"), 7 << 30))
    assert stale.judgement == "warn" and "rm /dev/shm/nccl-a /dev/shm/nccl-b" in stale.remedy
    (names,) = host_faults(network=Network("one", (), (HERE,)))
    assert names.judgement == "warn" and "/etc/hosts" in names.remedy
    other = Interface("eth0", "10.0.0.2")
    (address,) = host_faults(network=Network("one", ("10.0.0.2",), (other,)))
    assert address.judgement == "fail" and "--node-ip-address" in address.remedy
    assert len(host_faults(network=Network("one", (), (other,)))) == 2, "neither hides the other"
    fast = Network("one", ("10.0.0.1",), (HERE,), {"mlx5_0 port 1": "1: DOWN"})
    locked, port = host_faults(limits=Limits(65536, 64 << 10), network=fast)
    assert "ulimit -l unlimited" in locked.remedy and "mlx5_0 port 1 is 1: DOWN" in port.found
    (busy,) = host_faults(http_port=False)
    assert busy.judgement == "warn" and "http_options.port" in busy.remedy


def test_an_interface_that_is_not_the_nodes_own_is_refused() -> None:
    network = Network("one", ("10.0.0.1",), (HERE, Interface("docker0", "172.17.0.1")))
    (wrong,) = host_faults(network=network, environment={"NCCL_SOCKET_IFNAME": "docker"})
    assert wrong.judgement == "fail" and "docker0 172.17.0.1" in wrong.found and "unset" in wrong.remedy
    (missing,) = host_faults(network=network, environment={"GLOO_SOCKET_IFNAME": "ib0"})
    assert missing.judgement == "fail" and "none of its interfaces" in missing.found
    assert not host_faults(network=network, environment={"NCCL_SOCKET_IFNAME": "^docker,lo"})
    names = [
        [one.name for one in chosen(spec, network.interfaces)] for spec in ("eth", "=eth", "=eth0,docker0", "^=eth0")
    ]
    assert names == [["eth0"], [], ["eth0", "docker0"], ["docker0"]]


def test_a_disk_is_judged_by_how_long_the_checkpoint_takes() -> None:
    def faults(
        stored: int, rate: float, free: int = 10**12, hub: Hub | None = None, sample: int = 64 << 20
    ) -> list[Finding]:
        return host_faults(disk=Disk("/models", free, stored, rate, sample), hub=hub)

    assert not faults(16 * 10**9, 2e9)
    (slow,) = faults(160 * 10**9, 1e8)
    assert slow.judgement == "fail" and "1600 s" in slow.found and "NVMe" in slow.remedy
    assert faults(60 * 10**9, 1e8)[0].judgement == "warn"
    assert faults(10**9, 8e6, sample=24 << 20)[0].judgement == "warn", "so slow that the time was over first"
    assert not faults(10**7, 8e6, sample=1 << 20)
    asked = Hub("https://huggingface.co", 200, "", False, 140 * 10**9)
    (full,) = faults(0, 2e9, free=100 * 10**9, hub=asked)
    assert full.check == "room" and "HF_HOME" in full.remedy


def test_what_could_not_be_read_is_said() -> None:
    found = NodeFacts("one", None)
    found.take(b'{"section":"limits","error":"OSError: no"}\n{"section":"of another version"}\n', 5.0)
    faults = bad(host_findings(found, False, 900.0, False))
    assert {finding.judgement for finding in faults} == {"not checked"} and len(faults) == len(SECTIONS)
    assert any("longer than 5 s" in finding.found for finding in faults)


# Machines: read for real


def test_a_section_that_hangs_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")  # to open it waits for somebody who writes
    found = NodeFacts("one", None)
    found.take(run_probe(Asked(str(tmp_path)), within_s=2.0), 2.0)
    assert "longer than" in found.unread["disk"]
    assert found.sections["limits"].open_files > 0, "others are there, as many as this machine could read meanwhile"


@pytest.mark.skipif(not _has_namespaces(), reason="needs leave to make a namespace")
def test_planted_faults_of_a_machine_are_each_named() -> None:
    """Tiny shared memory, a low limit of files, and an interface that is not there, all in one namespace."""
    script = 'mount -t tmpfs -o size=32m tmpfs /dev/shm && exec prlimit --nofile=512 "$@"'
    command = [sys.executable, "-m", "deployments.cli", "doctor", "--node", "--json"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        cwd=ROOT,
        env=os.environ | {"NCCL_SOCKET_IFNAME": "eth99"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    faults = {one["check"]: one["remedy"] for one in said["findings"] if one["judgement"] == "fail"}
    assert said["verdict"] == "fail" and faults.keys() == {"shared memory", "open files", "interface"}
    assert "--shm-size" in faults["shared memory"] and "ulimit -n" in faults["open files"]
    assert "unset NCCL_SOCKET_IFNAME" in faults["interface"]


def test_a_source_that_is_not_there_fails_where_ranks_are() -> None:
    asked = Asked("/models/none")
    assert storage.read_disk(asked) is None and read_hub(asked) is None
    found = node(checkpoint=storage.refusal(asked))
    (fault,) = bad(host_findings(found, False, 900.0, False))
    assert (fault.check, fault.judgement) == ("checkpoint", "fail")
    assert "there is no folder /models/none" in fault.found and "hub id" in fault.remedy
    found.hosts_ranks = False
    assert not list(host_findings(found, False, 900.0, False))
    assert storage.refusal(Asked("configs/demo")) is None and storage.refusal(Asked()) is None


def test_cuda_is_judged_where_ranks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(on_gpus: bool, hosts_ranks: bool) -> str:
        found = NodeFacts("one", None, hosts_ranks, sections={"cuda": Cuda(None, on_bus=8)})
        return worst(list(host_findings(found, on_gpus, 900.0, False)))

    assert [verdict(True, True), verdict(False, True), verdict(True, False)] == ["fail", "warn", "ok"]


def test_a_sample_that_is_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_SAMPLE_BYTES", 4 << 20)
    names: list[list[Path]] = []

    def read(path: Path) -> tuple[float | None, int]:
        names.append(list(tmp_path.iterdir()))
        return 1.0, path.stat().st_size

    monkeypatch.setattr(storage, "read_rate", read)
    assert storage._measure(None, tmp_path) == (1.0, 4 << 20) and names == [[]]


def test_a_slow_disk_is_found_by_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(16 << 20))

    def crawl(descriptor: int, buffer: mmap.mmap, offset: int) -> int:
        time.sleep(0.3)
        return os.preadv(descriptor, [buffer], offset)

    rate, sample = storage.read_rate(file, crawl)
    assert rate is not None and rate < 14e6 and sample == 16 << 20
    quick, whole = storage.read_rate(file)
    assert quick is not None and quick > rate and whole == 16 << 20
    (fault,) = host_faults(disk=Disk(str(tmp_path), 10**12, 16 << 20, rate, sample))
    assert fault.check == "disk speed" and "NVMe" in fault.remedy


def test_sources_that_differ_between_nodes_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/one.py").write_text("x = 1\n")
    monkeypatch.setattr(host, "PROJECT_ROOT", tmp_path)
    nodes = [NodeFacts("one", None, sections={"versions": host.read_versions()})]
    assert not bad(cluster_findings(nodes))
    (tmp_path / "configs/one.py").write_text("x = 2\n")
    nodes.append(NodeFacts("two", None, sections={"versions": host.read_versions()}))
    (fault,) = bad(cluster_findings(nodes))
    assert (
        fault.judgement == "fail" and fault.found.startswith("stagemesh differs: sources ") and "image" in fault.remedy
    )
    assert "on one" in fault.found and "on two" in fault.found


def test_clocks_and_silent_nodes_are_named() -> None:
    late = NodeFacts("two", None, skew_s=-7.0, skew_error_s=0.2)
    silent = NodeFacts("three", None, is_silent="no answer within 25 s")
    first, second = bad(cluster_findings([NodeFacts("one", None, skew_s=0.01), late, silent]))
    assert (first.check, first.judgement, first.where) == ("node", "fail", "three")
    assert second.check == "clock" and "-7.0 s" in second.found and "NTP" in second.remedy


def test_a_port_that_swallows_connections_is_named() -> None:
    """A listener whose queue is full drops what comes, as a firewall does."""
    probe = NodeProbe()
    try:
        ((free, why),) = probe.listen("127.0.0.1", [0])
        assert why is None and probe.listen("127.0.0.1", [free]) == [(free, None)], "in use: it answers"
        ((_, refused),) = probe.listen("203.0.113.7", [0])
        assert "assign" in str(refused)
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            port = full.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)):
                errors = probe.reach([("127.0.0.1", free), ("127.0.0.1", port), ("127.0.0.1", 1)], 1.0)
    finally:
        for listener in probe._listeners:
            listener.close()
    assert errors[0] is None and "no answer" in str(errors[1]) and "refused" in str(errors[2]).lower()
    ways = [Way("10.0.0.1", "10.0.0.2", 30000, "a replica behind HAProxy", error) for error in errors]
    blocked = bad(way_findings(ways, {"10.0.0.1": "one", "10.0.0.2": "two"}))
    assert [finding.where for finding in blocked] == ["one → two"] * 2
    assert "port 30000 of 10.0.0.2" in blocked[0].found and "NetworkPolicy" in blocked[0].remedy
    assert worst(list(way_findings(ways[:1], {}))) == "ok"
    untried = Way("10.0.0.2", "10.0.0.2", 30000, "a replica behind HAProxy", refused, is_tried=False)
    assert worst(list(way_findings([ways[0], untried], {}))) == "not checked"


# The hub


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        is_open = "open" in self.path or self.headers.get("Authorization") == "Bearer right"
        self.send_response(404 if "missing" in self.path else 200 if is_open else 401)
        self.send_header("Content-Length", "2")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        names = {
            "model-1.safetensors": 7,
            "model-2.safetensors": 5,
            "consolidated.safetensors": 12,
            "x/y.safetensors": 1,
        }
        files = [{"rfilename": name, "size": size * 10**9} for name, size in names.items()]
        self.wfile.write(json.dumps({"siblings": files}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # its client has read it already
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    server.shutdown()
    server.server_close()


def told_of(model: str) -> Finding:
    found = read_hub(Asked(model))
    (told,) = [one for one in host_findings(node(hub=found), False, math.inf, False) if one.check == "hub"]
    return told


@pytest.mark.usefixtures("hub")
def test_the_hub_is_asked_for_the_model_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_hub(Asked("org/open"))
    assert found is not None and found.model_bytes == 12 * 10**9, "what is read: not the original format, no subfolders"
    assert told_of("org/open").judgement == "ok"
    closed = told_of("org/gated")
    assert closed.judgement == "fail" and "no token" in closed.found and "HF_TOKEN" in closed.remedy
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "may not read" in told_of("org/gated").found
    monkeypatch.setenv("HF_TOKEN", "right\n")  # as a secret that was read from a file
    assert told_of("org/gated").judgement == "ok"
    monkeypatch.setenv("HF_TOKEN", "secret word")
    refused = told_of("org/gated")
    assert refused.judgement == "fail" and "secret" not in refused.found + refused.remedy
    monkeypatch.delenv("HF_TOKEN")
    assert "model.source" in told_of("org/missing").remedy
    assert read_hub(Asked(str(ROOT / "configs/demo"))) is None, "a folder needs no hub"
    assert read_hub(Asked("s3://bucket/prefix")) is None, "neither does a URL"


def test_a_hub_that_is_not_reached_fails_only_what_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    lost = told_of("org/open")
    assert lost.judgement == "fail" and "not reached" in lost.found and "HF_ENDPOINT" in lost.remedy
    stored = node(hub=read_hub(Asked("org/open")), disk=Disk("/models", 10**12, 10**9, 1e9, 64 << 20))
    assert not bad(host_findings(stored, False, math.inf, False))


def test_an_object_store_is_asked_once(hub: None) -> None:
    endpoint = os.environ["HF_ENDPOINT"]  # any HTTP server is a store
    assert read_bucket(Asked("org/open")) is None
    assert read_bucket(Asked(f"{endpoint}/open")) == Bucket(f"{endpoint}/open", None)
    for url in (f"{endpoint}/missing", "http://127.0.0.1:1/open"):
        (fault,) = host_faults(bucket=read_bucket(Asked(url)))
        assert fault.check == "store" and url in fault.found and "model.source" in fault.remedy


# Links, as measured


def test_hops_are_measured_within_seconds_on_any_network() -> None:
    from cluster.collectives.speed import _TRIAL_SHARE, rounds_within

    assert rounds_within(12.0, 1e-4) == (True, 5)
    for rate in (1e7, 1e8, 1e9):  # bytes a second and shard
        trial_s = (512 << 20) / _TRIAL_SHARE / rate
        is_large, rounds = rounds_within(4.0, trial_s)
        assert rounds >= 1 and 2 * rounds * trial_s * (_TRIAL_SHARE if is_large else 1) <= 4.0
    assert rounds_within(4.0, 60.0) == (False, 1), "one at least"


def test_a_gpu_that_others_use_is_found_by_the_rank_that_got_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = hgx()
    gpus[3].pids = (4242,)
    gpus[5].used_bytes = 9 * GIB
    monkeypatch.setattr(nvml, "pynvml", FakeNvml(gpus))
    assert users_of("0") is None and users_of("MIG-0") is None
    assert "pid 4242" in str(users_of("GPU-00000003")) and "GPU 5" in str(users_of("5"))


def measured_of(
    rates: list[float], hops: list[float], pairs: dict[tuple[int, int, int], float] | None = None
) -> Measured:
    from cluster.collectives.speed import Rates

    found = [Rates(1e-5, rate, hop or None, None) for rate, hop in zip(rates, hops, strict=True)]
    return Measured(("10.0.0.1",) * len(rates), tuple(str(n) for n in range(len(rates))), tuple(found), pairs or {})


def layout(shards: int, stages: int) -> Layout:
    parallel = {"tensor_parallel_size": shards, "pipeline_parallel_size": stages}
    return Layout(Config.model_validate({"model": {"source": "x"}, "parallel": parallel}), "cuda")


def test_links_are_judged_beside_the_card_and_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [gpus_of(monkeypatch, hgx())]
    eight = layout(8, 1)
    assert eight.topology == Topology(8, 1)

    def verdicts(rate: float, pairs: dict[tuple[int, int, int], float] | None = None) -> list[Finding]:
        return bad(link_findings(eight, measured_of([rate] * 8, [0.0] * 8, pairs), nodes))

    assert not verdicts(440e9)
    (slow,) = verdicts(300e9)
    assert slow.judgement == "warn" and "65% of 460 GB/s, usual for NVIDIA H100" in slow.found
    assert verdicts(100e9)[0].judgement == "fail"
    pairs = {(0, a, b): 380e9 for a in range(8) for b in range(8) if a != b}
    pairs[0, 2, 5] = 40e9
    assert [finding.check for finding in verdicts(440e9, pairs)] == ["pairs"]
    four = measured_of([400e9] * 4, [0.0, 20e9, 20e9, 5e9])
    (hop,) = bad(link_findings(layout(1, 4), four, nodes))
    assert hop.check == "hops" and "stage 2 to 3" in hop.found and hop.judgement == "fail"


# The table


def test_the_table_shows_the_worst_first_and_equal_nodes_once() -> None:
    findings = [
        ok("names", "one", "resolves"),
        warn("shared memory", "one", "small", "a larger one"),
        warn("shared memory", "two", "small", "a larger one"),
        fail("ports", "one → two", "closed", "open it"),
        ok("names", "two", "resolves"),
    ]
    lines = as_text(findings).splitlines()
    assert lines[0].startswith("fail") and lines[1].strip() == "→ open it"
    assert "one, two: small" in lines[2] and "2 nodes like one: resolves" in lines[4]
    assert lines[-1] == "Verdict: fail (1 fail, 2 warn, 0 not checked, 2 ok)"
    assert all(len(line) <= 100 for line in lines)
