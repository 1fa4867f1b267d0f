"""k8s/ and the Dockerfile: what is rendered fits the schemas, the house's own files, and what Ray and KubeRay do.

Nothing here talks to a cluster. What only one could show is listed in docs/kubernetes.md.
"""

import argparse
import functools
import gzip
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from actors.tensors.backends.choose import placed_on
from cluster.placement.nodes import NodeFree
from cluster.placement.placement import check, make_needs, resolve_strategy
from cluster.topology import Topology
from configs.config import Config
from configs.files import read_config
from deployments import app, cli
from deployments.batch.command import add_options
from deployments.serve.environment import ENVIRONMENT
from deployments.serve.schema import check_schema
from k8s.embed import OVERLAYS, WAIT_S, embedded
from k8s.embed import main as embed
from tests.kustomize import Resource, render

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
NAMES = sorted(path.name for path in (K8S / "overlays").iterdir())
SERVED = sorted(OVERLAYS)
ALL = pytest.mark.parametrize("name", NAMES)
ALL_SERVED = pytest.mark.parametrize("name", SERVED)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # KubeRay's own rule for its names
UNITS = {"": 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@functools.cache
def resources(name: str) -> tuple[Resource, ...]:
    """What an overlay is rendered to. Read only: it is made once."""
    return tuple(render(K8S / "overlays" / name))


@functools.cache
def schemas() -> dict[str, Any]:
    return json.loads(gzip.decompress((ROOT / "tests/data/kubernetes.json.gz").read_bytes()))


def of_kind(name: str, *kinds: str) -> list[Resource]:
    return [resource for resource in resources(name) if resource["kind"] in kinds]


def cluster(name: str) -> dict[str, Any]:
    (owner,) = of_kind(name, "RayService", "RayJob")
    return owner["spec"].get("rayClusterConfig") or owner["spec"]["rayClusterSpec"]


def head(name: str) -> dict[str, Any]:
    return cluster(name)["headGroupSpec"]


def workers(name: str) -> dict[str, Any]:
    (group,) = cluster(name)["workerGroupSpecs"]
    return group


def pods(name: str) -> list[dict[str, Any]]:
    return [head(name)["template"]["spec"], workers(name)["template"]["spec"]]


def containers(name: str) -> list[dict[str, Any]]:
    return [container for pod in pods(name) for container in pod["containers"]]


def environment(name: str) -> dict[str, str]:
    (found,) = of_kind(name, "ConfigMap")
    return found["data"]


def amount(text: str | int) -> float:
    found = re.fullmatch(r"([\d.]+)(\w*)", str(text))
    assert found, text
    return float(found[1]) * UNITS[found[2]]


def ports(container: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def serve_config(name: str) -> dict[str, Any]:
    (service,) = of_kind(name, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def config(name: str) -> Config:
    """The config that a cluster runs: the embedded one, or that of the job's command."""
    if name in OVERLAYS:
        return Config.model_validate(serve_config(name)["applications"][0]["args"])
    return read_config(job_config(name))


def job_command(name: str) -> list[str]:
    (job,) = of_kind(name, "RayJob")
    return shlex.split(job["spec"]["entrypoint"])


def job_config(name: str) -> Path:
    (path,) = [word for word in job_command(name) if word.endswith(".yaml")]
    return ROOT / Path(path).relative_to("/app")


# Structure


@ALL
def test_resources_fit_the_schemas_of_kuberay_and_kubernetes(name: str) -> None:
    for resource in resources(name):
        problems = jsonschema.Draft202012Validator(schemas()[resource["kind"]]).iter_errors(resource)
        assert not [f"{resource['kind']}: {problem.json_path}: {problem.message[:300]}" for problem in problems]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("RayService", "fsGroupChangePolicy"),
        ("RayJob", "submissionMode"),
        ("NetworkPolicy", "namespaceSelector"),
        ("PersistentVolumeClaim", "accessModes"),
        ("PodDisruptionBudget", "unhealthyPodEvictionPolicy"),
        ("ConfigMap", "data"),
    ],
)
def test_the_schemas_see_a_typing_mistake(kind: str, key: str) -> None:
    name = {"RayJob": "batch", "PersistentVolumeClaim": "llama8b"}.get(kind, "demo")
    right = json.dumps(of_kind(name, kind)[0])
    wrong = right.replace(f'"{key}": ', f'"{key}s": ')
    assert wrong != right
    validator = jsonschema.Draft202012Validator(schemas()[kind])
    assert validator.is_valid(json.loads(right)) and not validator.is_valid(json.loads(wrong))


@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in NAMES), "monitoring"])
def test_kubectl_renders_the_same(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: tests/kustomize.py is not compared with it")
    text = subprocess.run([kubectl, "kustomize", K8S / folder], capture_output=True, text=True, check=True).stdout

    def place(resource: Resource) -> tuple[str, str]:
        return resource["kind"], resource["metadata"]["name"]

    assert sorted(yaml.safe_load_all(text), key=place) == sorted(render(K8S / folder), key=place)


@ALL
def test_names_are_such_that_kuberay_can_make_others_of_them(name: str) -> None:
    for resource in resources(name):
        called = resource["metadata"]["name"]
        assert DNS_1035.fullmatch(called) and len(called) <= 47
        assert "namespace" not in resource["metadata"], "a namespace is the user's to choose"
    assert DNS_1035.fullmatch(workers(name)["groupName"])
    for application in serve_config(name)["applications"] if name in OVERLAYS else ():
        assert DNS_1035.fullmatch(application["name"])


def test_the_shell_is_a_pod_like_the_workers() -> None:
    shell = yaml.safe_load((K8S / "shell.yaml").read_text(encoding="utf-8"))
    assert jsonschema.Draft202012Validator(schemas()["Pod"]).is_valid(shell)
    pod, (container,) = pods("llama8b")[1], shell["spec"]["containers"]
    (worker,) = pod["containers"]
    for key in ("securityContext", "automountServiceAccountToken"):
        assert shell["spec"][key] == pod[key]
    assert (container["image"], container["securityContext"]) == (worker["image"], worker["securityContext"])
    assert container["volumeMounts"] == [mount for mount in worker["volumeMounts"] if mount["name"] == "models"]
    assert shell["spec"]["volumes"] == [volume for volume in pod["volumes"] if volume["name"] == "models"]
    assert worker["env"][0] in container["env"]
    assert {"name": "HF_HOME", "value": environment("llama8b")["HF_HOME"]} in container["env"]
    assert shell["metadata"]["labels"] != {"app": "stagemesh"}, "it must not be counted as a pod of the cluster"


# What KubeRay and Ray make of it


@ALL
def test_rays_version_is_that_of_the_image_and_a_token_guards_it(name: str) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={cluster(name)['rayVersion']}" in pins
    assert cluster(name)["authOptions"] == {"mode": "token", "secretName": "stagemesh-ray-token"}


@ALL
def test_the_head_hosts_nothing_and_a_lost_pod_takes_no_other_along(name: str) -> None:
    params = head(name)["rayStartParams"]
    assert params["num-cpus"] == "0" and params["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in head(name)["template"]["spec"]["containers"][0]["resources"]["limits"]
    group = workers(name)
    assert group["numOfHosts"] == 1
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if not cluster(name).get("enableInTreeAutoscaling"):
        assert group["minReplicas"] == group["maxReplicas"]


@ALL_SERVED
def test_the_service_leaves_the_head_out_and_its_old_cluster_stays_for_the_longest_request(name: str) -> None:
    (service,) = of_kind(name, "RayService")
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= config(name).timeouts.request_s


@ALL
def test_pods_are_what_a_restricted_namespace_takes(name: str) -> None:
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(key.startswith("host") for key in pod)
    options = cluster(name).get("autoscalerOptions")
    for container in [*containers(name), *([options] if options else [])]:
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    needs_api = bool(cluster(name).get("enableInTreeAutoscaling"))
    assert [pod["automountServiceAccountToken"] for pod in pods(name)] == [needs_api, False]


@ALL
def test_requests_are_limits_and_shared_memory_is_a_part_of_the_memory(name: str) -> None:
    for pod, params in zip(pods(name), (head(name), workers(name)), strict=True):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shm["medium"] == "Memory"
        store = amount(params["rayStartParams"]["object-store-memory"])
        memory = amount(container["resources"]["limits"]["memory"])
        assert store < amount(shm["sizeLimit"]) <= memory / 2


@ALL
def test_volumes_can_be_mounted_by_as_many_pods_as_there_are(name: str) -> None:
    claims = {claim["metadata"]["name"]: claim["spec"] for claim in of_kind(name, "PersistentVolumeClaim")}
    used = [volume["persistentVolumeClaim"]["claimName"] for volume in pods(name)[1]["volumes"] if len(volume) == 2
            and "persistentVolumeClaim" in volume]  # fmt: skip
    assert sorted(used) == sorted(claims)
    for claim in claims.values():
        assert claim["accessModes"] == (["ReadWriteMany"] if workers(name)["maxReplicas"] > 1 else ["ReadWriteOnce"])
    if claims:
        (mounted,) = [mount["mountPath"] for mount in containers(name)[1]["volumeMounts"] if mount["name"] == "models"]
        assert environment(name)["HF_HOME"].startswith(mounted)


@ALL
def test_no_eviction_while_there_are_no_pods_to_spare(name: str) -> None:
    """The head is counted apart: more workers than are needed do not make up for it."""
    budgets = [budget["spec"] for budget in of_kind(name, "PodDisruptionBudget")]
    needed = {budget["selector"]["matchLabels"]["ray.io/node-type"]: budget["minAvailable"] for budget in budgets}
    assert needed == {"head": 1, "worker": workers(name)["minReplicas"]}
    assert {budget["unhealthyPodEvictionPolicy"] for budget in budgets} == {"IfHealthyBudget"}


@ALL
def test_labels_are_those_that_everything_selects_by(name: str) -> None:
    labels = {"app": "stagemesh"}
    assert head(name)["template"]["metadata"]["labels"] == workers(name)["template"]["metadata"]["labels"] == labels
    for policy in of_kind(name, "NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= (labels | {"ray.io/node-type": "head"}).items()
    for budget, kind in zip(of_kind(name, "PodDisruptionBudget"), ("head", "worker"), strict=True):
        assert budget["spec"]["selector"]["matchLabels"] == labels | {"ray.io/node-type": kind}


# Ports


@ALL
def test_ports_are_named_as_kuberay_looks_for_them(name: str) -> None:
    at_head, at_worker = map(ports, containers(name))
    assert at_head.items() >= {"gcs-server": 6379, "dashboard": 8265, "serve": 8000, "metrics": 8080}.items()
    assert at_worker == {"serve": 8000, "metrics": 8080, "haproxy-metrics": 9101, "replica": 30000}
    assert all(len(port) <= 15 for port in (*at_head, *at_worker)), "Kubernetes' limit for names of ports"
    if name in OVERLAYS:
        assert serve_config(name)["http_options"]["port"] == at_worker["serve"]


def rules(name: str, direction: str) -> Iterator[tuple[str, list[dict[str, Any]], set[int] | None]]:
    """Each rule: its policy, its peers, its ports (None: all)."""
    for policy in of_kind(name, "NetworkPolicy"):
        for rule in policy["spec"].get(direction, ()):
            peers = rule["from" if direction == "ingress" else "to"]
            opened = {port["port"] for port in rule["ports"]} if "ports" in rule else None
            yield policy["metadata"]["name"], peers, opened


@ALL
def test_only_clients_prometheus_and_the_operator_get_in_and_only_where_they_must(name: str) -> None:
    within = [{"podSelector": {"matchLabels": {"app": "stagemesh"}}}]
    opened = {tuple(sorted(ports)) for _, peers, ports in rules(name, "ingress") if ports is not None and peers}
    assert opened == {(8000,), (8080, 9101, 30000, 44217, 44227), (8265,)}
    assert [peers for _, peers, ports in rules(name, "ingress") if ports is None] == [within]
    (operator,) = [peers for _, peers, ports in rules(name, "ingress") if ports == {8265}]
    assert operator == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        }
    ]
    scraped = {ports(c).get(m["port"]) for kind, c in monitored(name) for m in kind} - {None}
    (prometheus,) = [ports for _, _, ports in rules(name, "ingress") if ports and 8080 in ports]
    assert scraped <= prometheus


@ALL
def test_pods_get_out_to_each_other_names_and_https_only(name: str) -> None:
    found = {policy: [] for policy, _, _ in rules(name, "egress")}
    for policy, peers, opened in rules(name, "egress"):
        found[policy].append(opened)
        for block in (peer["ipBlock"] for peer in peers if "ipBlock" in peer):
            anywhere = block["cidr"] == "0.0.0.0/0"
            assert not anywhere or block["except"] == ["169.254.0.0/16"], "the cloud's metadata service"
    assert found.pop("stagemesh") == [None, {53}, {443}]
    api = {"stagemesh-autoscaler": [{6443}]} if cluster(name).get("enableInTreeAutoscaling") else {}
    assert found == api


def monitored(name: str) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """What each monitor scrapes, and of which container."""
    monitoring = {resource["kind"]: resource for resource in render(K8S / "monitoring")}
    service, pod = monitoring["ServiceMonitor"], monitoring["PodMonitor"]
    at_head, at_worker = containers(name)
    return [(service["spec"]["endpoints"], at_head), (pod["spec"]["podMetricsEndpoints"], at_worker)]


def test_monitors_scrape_ports_that_are_there() -> None:
    for endpoints, container in monitored("autoscaling"):
        assert {endpoint["port"] for endpoint in endpoints} <= set(ports(container))
    paths = {endpoint["port"]: endpoint.get("path", "/metrics") for endpoint in monitored("autoscaling")[1][0]}
    assert paths["replica"] == "/metrics/replica", "all pods would give the series of all replicas"
    low = environment("autoscaling").get("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "30000")
    assert ports(containers("autoscaling")[1])["replica"] == int(low)
    assert environment("autoscaling")["RAY_SERVE_PORT_QUARANTINE_S"] == "0"


# Probes and endings


@ALL_SERVED
def test_a_worker_is_ready_when_its_proxy_serves_and_never_ended_for_the_model(name: str) -> None:
    at_head, at_worker = containers(name)
    assert not {"livenessProbe", "startupProbe"} & (set(at_head) | set(at_worker)), "KubeRay's own ask Ray alone"
    probe = at_worker["readinessProbe"]
    *shell, script = probe["exec"]["command"]
    assert shell == ["bash", "-c"]
    asked = re.findall(r"wget --tries 1 -T (\d+) -q -O- http://localhost:(\d+)(\S+) \| grep success", script)
    assert [(int(port), path) for _, port, path in asked] == [
        (52365, "/api/local_raylet_healthz"),
        (ports(at_worker)["serve"], "/-/healthz"),
    ]
    assert probe["timeoutSeconds"] > sum(int(seconds) for seconds, _, _ in asked)
    assert probe["failureThreshold"] > 1, "one late answer would take the pod out of the Service"


def test_a_job_waits_for_pods_only_as_far_as_they_can_become_ready() -> None:
    assert all("readinessProbe" not in container for container in containers("batch"))


@ALL
def test_what_runs_can_end_before_ray_and_kubernetes_end_it(name: str) -> None:
    timeouts, variables = config(name).timeouts, environment(name)
    draining = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert draining > timeouts.drain_s + app._ENDING_S
    for pod in pods(name):
        assert pod["terminationGracePeriodSeconds"] >= draining + 15
        assert all("lifecycle" not in container for container in pod["containers"]), "no preStop: it skips the drain"
    assert float(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= timeouts.request_s


# Environment, images, secrets


@ALL
def test_containers_have_the_environment_of_make_serve(name: str) -> None:
    assert environment(name).items() >= ENVIRONMENT.items()
    assert environment(name)["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    for container in containers(name):
        environment_map, *secrets = container["envFrom"]
        assert environment_map == {"configMapRef": {"name": "stagemesh-environment"}}
        assert secrets in ([], [{"secretRef": {"name": "stagemesh-store", "optional": True}}])
        for variable in container.get("env", ()):
            assert set(variable) == {"name", "valueFrom"}, "what is no secret stands in the ConfigMap"
            assert "secretKeyRef" in variable["valueFrom"]
    assert not [resource for resource in resources(name) if resource["kind"] == "Secret"]
    assert not re.search(r"token|key|password", json.dumps(environment(name)), re.IGNORECASE)


@ALL
def test_one_image_for_all_of_the_version_and_the_device(name: str) -> None:
    (image,) = {container["image"] for container in containers(name)}
    device = "cuda" if placed_on(config(name).device) == "cuda" else "cpu"
    assert image.endswith(f"stagemesh:{PROJECT['version']}-{device}")
    assert "latest" not in image


@ALL
def test_gpus_come_with_what_they_need(name: str) -> None:
    gpus = int(containers(name)[1]["resources"]["limits"].get("nvidia.com/gpu", 0))
    tolerated = [toleration["key"] for toleration in pods(name)[1].get("tolerations", ())]
    secrets = [variable["valueFrom"]["secretKeyRef"]["name"] for variable in containers(name)[1].get("env", ())]
    assert tolerated == (["nvidia.com/gpu"] if gpus else [])
    assert secrets == (["stagemesh-hf-token"] if gpus else [])
    if workers(name)["maxReplicas"] > 1 and config(name).parallel.pipeline_parallel_size > 1:
        variables = environment(name)
        assert variables["NCCL_SOCKET_IFNAME"] == f"={variables['GLOO_SOCKET_IFNAME']}"


@ALL
def test_pods_with_gpus_are_looked_at_before_they_join(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, gpus = containers(name)[1], containers(name)[1]["resources"]["limits"].get("nvidia.com/gpu")
    assert "initContainers" not in pods(name)[0], "the head has no GPU to look at"
    doctors = pods(name)[1].get("initContainers", [])
    assert [doctor["name"] for doctor in doctors] == (["doctor"] if gpus else [])
    for doctor in doctors:
        assert doctor["image"] == worker["image"] and doctor["envFrom"] == worker["envFrom"]
        assert doctor["securityContext"] == worker["securityContext"]
        assert doctor["resources"]["limits"]["nvidia.com/gpu"] == gpus, "else it sees none, or other ones"
        assert {mount["mountPath"] for mount in doctor["volumeMounts"]} >= {"/dev/shm"}
        monkeypatch.setattr("deployments.doctor.command.run", lambda options: 0 if options.node else 1)
        assert doctor["command"][:3] == ["python", "-m", "deployments.cli"]
        assert cli.main(doctor["command"][3:]) == 0


# Serve configs


@ALL_SERVED
def test_the_embedded_config_is_that_of_its_file(name: str) -> None:
    path = ROOT / "configs" / OVERLAYS[name]
    text = (K8S / "overlays" / name / "serve.yaml").read_text(encoding="utf-8")
    assert text == embedded(path, f"configs/{path.name}"), "run `python k8s/embed.py`"
    written, shipped = serve_config(name), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written["proxy_location"] == "EveryNode" and written["http_options"].pop("host") == "0.0.0.0"
    assert written["applications"][0]["args"]["placement"].pop("wait_s") == WAIT_S
    shipped["http_options"].pop("host")
    del written["proxy_location"], shipped["proxy_location"]
    shipped["applications"][0]["args"].setdefault("placement", {})
    assert written == shipped


# Every file of configs/ is planned in tests/cpu/test_plan_command.py; what is embedded differs in host and waiting.
LARGE = pytest.mark.soak(reason="seconds each, for the same plan")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LARGE if name.startswith(("llama70b", "llama405b")) else ()) for name in SERVED]
)
def test_the_embedded_config_passes_serve_and_the_plan(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve.yaml"
    (service,) = of_kind(name, "RayService")
    path.write_text(service["spec"]["serveConfigV2"])
    check_schema(path)
    assert cli.main(["plan", str(path)]) == 0, capsys.readouterr()


def nodes(name: str, count: int) -> list[NodeFree]:
    """Ray nodes as KubeRay starts them from the workers' pods."""
    limits = containers(name)[1]["resources"]["limits"]
    cpus, gpus = amount(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))
    return [NodeFree(str(i), f"worker-{i}", cpus=cpus, gpus=gpus, free_cpus=cpus, free_gpus=gpus) for i in range(count)]


@ALL
def test_the_stages_fit_the_pods(name: str) -> None:
    parallel, placement = config(name).parallel, config(name).placement
    topology = Topology(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    needs = make_needs(topology, placement, placed_on(config(name).device))
    strategy = resolve_strategy(placement, topology)
    count = workers(name)["minReplicas"]
    assert check(needs, strategy, nodes(name, count)).node_ids is not None
    spare = topology.pipeline_parallel_size > 1 and strategy == "STRICT_SPREAD"
    assert (check(needs, strategy, nodes(name, count - 1)).node_ids is not None) == spare, "one node to spare, or none"


def test_replicas_scale_within_the_pods() -> None:
    (deployment,) = serve_config("autoscaling")["applications"][0]["deployments"]
    assert deployment["name"] == app._DEPLOYMENT
    scaling, group = deployment["autoscaling_config"], workers("autoscaling")
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    assert config("autoscaling").admission.max_requests > scaling["target_ongoing_requests"]
    options = cluster("autoscaling")["autoscalerOptions"]
    assert options["version"] == "v2" and amount(options["resources"]["limits"]["cpu"]) >= 1


def test_a_config_of_ones_own_is_embedded_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "configs/demo.yaml").read_text(encoding="utf-8").replace("0.25", "0.5"))
    assert embed([str(path)]) == 0
    patch = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(patch["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert written["placement"] == {"cpus_per_rank": 0.5, "cpus_per_replica": 0.5, "wait_s": WAIT_S}
    path.write_text("applications: []\n")
    assert embed([str(path)]) == 2
    assert "applications: missing or empty" in capsys.readouterr().err


@ALL
def test_the_page_says_what_each_overlay_is(name: str) -> None:
    page = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    file = job_config(name).name if name == "batch" else OVERLAYS[name]
    gpus = int(containers(name)[1]["resources"]["limits"].get("nvidia.com/gpu", 0))
    counts = sorted({workers(name)["minReplicas"], workers(name)["maxReplicas"]})
    pods = " to ".join(map(str, counts))
    assert f"| `{name}` | `configs/{file}` | {pods} | {gpus or 'none'} |" in page


# The job


def test_the_job_runs_a_command_that_is_there_on_a_pod_with_its_files() -> None:
    (job,) = of_kind("batch", "RayJob")
    assert job["spec"]["submissionMode"] == "HTTPMode" and job["spec"]["shutdownAfterJobFinishes"] is True
    python, flag, module, *words = job_command("batch")
    assert (python, flag, module) == ("python", "-m", "deployments.batch")
    assert (ROOT / "deployments/batch/__main__.py").is_file()
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = parser.parse_args(words)
    assert (ROOT / Path(options.config).relative_to("/app")).is_file()
    mounted = [mount["mountPath"] for mount in containers("batch")[1]["volumeMounts"]]
    for file in (options.input, options.output):
        assert any(file.startswith(mount + "/") for mount in mounted), "on a volume that outlives the job"
    needed = config("batch").placement.cpus_per_rank + config("batch").placement.cpus_per_replica
    cpus = amount(containers("batch")[1]["resources"]["limits"]["cpu"])
    assert job["spec"]["entrypointNumCpus"] > 0 and job["spec"]["entrypointNumCpus"] + needed <= cpus


# The image


def test_what_the_dockerfile_copies_is_there_and_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {path for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for path in line.split()[:-1]}
    assert copied == sent
    assert all((ROOT / path).exists() for path in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(packages["packages"]) < copied


def test_the_dockerfile_installs_what_the_makefile_does() -> None:
    def installs(text: str, program: str) -> list[str]:
        line = rf"{program} (?:--extra-index-url \S+ )?(-c constraints\.txt .+?)(?:;| &&|$)"
        found = re.findall(line, text, re.MULTILINE)
        return [re.sub(r"-e .+", "-e .", " ".join(line.split())) for line in found]

    expected = installs(MAKEFILE, r"\$\(PIP\) install")
    assert len(expected) == 3 and installs(DOCKERFILE, "python -m pip install") == expected
    assert "ARG EXTRAS=\n" in DOCKERFILE and '-e ".${EXTRAS}"' in DOCKERFILE, (
        "what a cluster needs, not what tests need"
    )


def test_the_image_is_what_kuberay_and_the_pods_expect() -> None:
    stages = dict(re.findall(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, re.MULTILINE))
    assert list(stages.values()) == ["cpu", "cuda"] and "FROM ${DEVICE}" in DOCKERFILE
    (base,) = [image for image in stages if ":" in image]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert base.split(":")[1].startswith("3.11-") and "Python 3.11" in pinned
    (user,) = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert {pod["securityContext"]["runAsUser"] for name in NAMES for pod in pods(name)} == {int(user)}
    assert f"--uid {user} " in DOCKERFILE
    assert "install -y --no-install-recommends wget" in DOCKERFILE, "the probes ask by wget"
    assert DOCKERFILE.count("compileall") == 2 and "PYTHONDONTWRITEBYTECODE" not in DOCKERFILE
    assert re.search(r"AS cuda.*install -y --no-install-recommends gcc", DOCKERFILE, re.DOTALL), "Triton calls it"
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    assert workdir == "/app"
    tags = re.findall(r"stagemesh:(\S+)-(?:cpu|cuda)", DOCKERFILE)
    assert set(tags) == {PROJECT["version"]}


@ALL_SERVED
def test_api_keys_are_mounted_where_replicas_run_and_may_be_missing(name: str) -> None:
    at_worker = pods(name)[1]
    (volume,) = [volume for volume in at_worker["volumes"] if volume["name"] == "api-keys"]
    assert volume["secret"] == {"secretName": "stagemesh-api-keys", "optional": True}
    (mount,) = [mount for mount in containers(name)[1]["volumeMounts"] if mount["name"] == "api-keys"]
    path = f"{mount['mountPath']}/keys.yaml"
    assert mount["readOnly"] and f"file:{path}" in (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    Config.model_validate({"model": {"source": "x"}, "api": {"keys": f"file:{path}"}})
    assert "--from-file=keys.yaml" in (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
