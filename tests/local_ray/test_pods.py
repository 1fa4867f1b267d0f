"""The pods of the demo overlay as two Ray nodes of this machine: in namespaces, started as KubeRay starts them.

This is not Kubernetes. It runs what the manifests say (arguments, environment, Serve config, probe, grace period) on
two nodes with addresses, processes, /tmp and /dev/shm of their own, and plays the operator: it submits once, by HTTP.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kustomize import render
from tests.node_kit import Nodes, why_not
from tests.serving import until

ROOT = Path(__file__).resolve().parents[2]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}  # from the secret, in a cluster
OPERATORS = {"RAY_timeout_ms_task_wait_for_death_info": "0", "RAY_gcs_server_request_timeout_seconds": "5"}
OPERATORS |= {"RAY_SERVE_KV_TIMEOUT_S": "5"}  # what KubeRay adds for a RayService
HEAD, WORKER = 0, 1

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]


class Pods:
    """A head and a worker, by what the overlay is rendered to."""

    def __init__(self, overlay: str, nodes: Nodes) -> None:
        resources = {
            (found["kind"], found["metadata"]["name"]): found for found in render(ROOT / "k8s/overlays" / overlay)
        }
        self.spec: dict[str, Any] = resources["RayService", "stagemesh"]["spec"]
        cluster = self.spec["rayClusterConfig"]
        self.groups = (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0])
        environment: dict[str, str] = resources["ConfigMap", "stagemesh-environment"]["data"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        nodes.environment = environment | TOKEN | OPERATORS | {"PATH": path, "PYTHONPATH": str(ROOT)}
        self.nodes = nodes

    def start(self, node: int) -> None:
        """`ray start`, with what KubeRay adds, as the first process of its namespace."""
        limits = self.groups[node]["template"]["spec"]["containers"][0]["resources"]["limits"]
        params = {"num-cpus": limits["cpu"], "memory": int(limits["memory"].removesuffix("Gi")) << 30}
        params |= {"dashboard-agent-listen-port": 52365, "metrics-export-port": 8080} | self.groups[node][
            "rayStartParams"
        ]
        head = f"--address={self.nodes[HEAD].address}:6379"
        where = ["--head", "--dashboard-host=0.0.0.0"] if node == HEAD else [head]
        options = [f"--{key}={value}" for key, value in params.items()]
        self.nodes.start(node, "env", "--chdir=/", "ray", "start", *where, "--block", *options)

    def curl(self, target: int, path: str, *options: str, source: int = HEAD) -> str:
        """What a server says; empty while it does not answer."""
        command = ["curl", "--silent", "--max-time", "20", *options, f"http://{self.nodes[target].address}:{path}"]
        return subprocess.run(self.nodes[source].inside(*command), capture_output=True, text=True).stdout

    def status(self, path: str, *options: str) -> str:
        """The HTTP status of the head's dashboard, as the operator asks it."""
        return self.curl(HEAD, path, "--output", "/dev/null", "--write-out", "%{http_code}", *options)

    def submit(self) -> str:
        """As KubeRay does, once the head answers. The HTTP status."""
        body = json.dumps(yaml.safe_load(self.spec["serveConfigV2"]))
        token = f"Authorization: Bearer {TOKEN['RAY_AUTH_TOKEN']}"
        options = [
            "--max-time",
            "90",
            "--request",
            "PUT",
            "--header",
            token,
            "--header",
            "Content-Type: application/json",
            "--data",
            body,
        ]
        return self.status("8265/api/serve/applications/", *options)

    def application(self) -> str:
        """Serve's status of the application."""
        token = f"Authorization: Bearer {TOKEN['RAY_AUTH_TOKEN']}"
        found = json.loads(self.curl(HEAD, "8265/api/serve/applications/", "--header", token) or "{}")
        return next((app["status"] for app in found.get("applications", {}).values()), "")

    def is_ready(self) -> bool:
        """The worker's readiness probe, run as the kubelet does: in the pod."""
        probe = self.groups[WORKER]["template"]["spec"]["containers"][0]["readinessProbe"]["exec"]["command"]
        return subprocess.run(self.nodes[WORKER].inside(*probe), capture_output=True).returncode == 0


@pytest.mark.timeout(600)
def test_the_demo_serves_drains_and_ends_as_its_manifests_say(tmp_path: Path) -> None:
    with Nodes(tmp_path, 2) as nodes:
        pods = Pods("demo", nodes)
        pods.start(HEAD)
        until(lambda: pods.status("8265/api/gcs_healthz") == "200", 120, every_s=1)
        assert pods.status("8265/api/serve/applications/") == "401", "nobody gets in without the token"
        until(lambda: pods.submit() == "200", 180, every_s=2)  # the operator tries again too
        moment = time.monotonic()
        while time.monotonic() < moment + 20:  # without placement.wait_s it has failed by then, for good
            assert pods.application() in ("DEPLOYING", "")
            time.sleep(1)
        pods.start(WORKER)
        until(pods.is_ready, 240, every_s=1)
        assert pods.application() == "RUNNING"

        question = {"role": "user", "content": "What is a stage?"}
        body = json.dumps({"model": "stagemesh-demo", "messages": [question], "temperature": 0})
        asked = ["--header", "Content-Type: application/json", "--data", body]
        answer = json.loads(pods.curl(WORKER, "8000/v1/chat/completions", *asked))
        assert answer["choices"][0]["message"]["content"].startswith("A stage is a run of consecutive layers")
        assert "stagemesh_requests_running{" in pods.curl(WORKER, "30000/metrics"), "where the PodMonitor looks"
        assert "haproxy_" in pods.curl(WORKER, "9101/metrics") and "ray_" in pods.curl(WORKER, "8080/metrics")
        assert pods.curl(HEAD, "44227/metrics") and pods.curl(HEAD, "44217/metrics")

        body = json.dumps(
            {"model": "stagemesh-demo", "prompt": "A", "max_tokens": 400, "ignore_eos": True, "stream": True}
        )
        url = f"http://{nodes[WORKER].address}:8000/v1/completions"
        stream = subprocess.Popen(
            nodes[HEAD].inside("curl", "--silent", "--no-buffer", *asked[:2], "--data", body, url),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert stream.stdout is not None and stream.stdout.readline().startswith("data: ")
        began = time.monotonic()
        nodes[WORKER].terminate()
        until(lambda: not pods.is_ready(), 30, every_s=1)  # so the pod is taken out of the Service
        assert stream.stdout.read().rstrip().endswith("data: [DONE]"), "what runs is finished"
        grace_s = pods.groups[WORKER]["template"]["spec"]["terminationGracePeriodSeconds"]
        nodes[WORKER].wait(grace_s - (time.monotonic() - began))
        assert b"Draining for up to 45" in nodes[WORKER].log.read_bytes()
