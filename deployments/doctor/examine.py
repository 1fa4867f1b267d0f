"""Examines this machine, or every node of a Ray cluster and the links between them."""

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from actors.tensors.backends.choose import placed_on
from cluster.placement.nodes import read_nodes
from cluster.placement.nvml import NodeGpus
from cluster.placement.placement import Fit, check, make_needs, resolve_device, resolve_strategy
from cluster.placement.resources import NodeFree, StageNeed
from configs.config import Config
from deployments.doctor.cluster_findings import cluster_findings, way_findings
from deployments.doctor.facts import Asked, NodeFacts
from deployments.doctor.findings import Finding, fail, not_checked, ok
from deployments.doctor.gpu_findings import foreign_users, gpu_findings
from deployments.doctor.host_findings import host_findings
from deployments.doctor.link_findings import link_findings
from deployments.doctor.links import Layout, NotStarted, measure_links
from deployments.doctor.nodes import head_address, looked_at
from deployments.doctor.probe import run_probe

_HERE_S = 20.0  # for the sections of this machine

Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What is examined: for a config, or for none."""

    config: Config | None
    http_port: int | None = None

    @property
    def asked(self) -> Asked:
        """What the probes are told."""
        if self.config is None:
            return Asked()
        model = self.config.model
        return Asked(model.source, model.revision, self.http_port, model.cache_folder)


def examine_here(question: Question, say: Say) -> list[Finding]:
    """Of this machine alone, without Ray."""
    say("looking at this machine")
    node = NodeFacts(platform.node(), None)
    node.take(run_probe(question.asked, _HERE_S), _HERE_S)
    return [
        *cluster_findings([node]),
        *_of_node(node, question, _own_shards(node, question), judge_environment=_is_in_a_pod()),
    ]


def examine_cluster(question: Question, say: Say, is_own: bool) -> list[Finding]:
    """Every node of the cluster that this process is connected to. `is_own`: it was started here, for this."""
    alive = [node for node in read_nodes() if node.alive]
    config = question.config or _widest(alive)
    device = resolve_device(placed_on(config.device), alive)
    layout = Layout(config, device)
    needs = make_needs(layout.topology, config.placement, device)
    fit = check(needs, resolve_strategy(config.placement, layout.topology), alive)
    hosts = {node.node_id for node in alive if any(_could_host(node, need) for need in dict.fromkeys(needs))}
    findings = [_room(fit)]
    with looked_at(alive, hosts) as nodes:
        say(f"looking at {len(alive)} nodes: machines, GPUs, disks, access")
        nodes.look(question.asked, config.network.interface)
        facts = list(nodes.facts.values())
        if len(alive) > 1:
            say("trying the ways between nodes")
            findings += way_findings(
                nodes.try_ways(head_address()), {node.address: node.name for node in facts if node.address}
            )
    findings += cluster_findings(facts)
    shards = layout.topology.tensor_parallel_size if device == "cuda" else None
    for node in facts:
        if node.is_silent is None:
            findings += _of_node(node, question, shards, judge_environment=not is_own)
    say("measuring the links inside and between stages")
    return [*findings, *_links(layout, fit, facts)]


def _of_node(node: NodeFacts, question: Question, shards: int | None, judge_environment: bool) -> Iterator[Finding]:
    """`shards` of a stage on GPUs; None: ranks are on CPUs."""
    config = question.config
    start_s = config.timeouts.start_s if config is not None else math.inf
    yield from host_findings(node, shards is not None, start_s, judge_environment)
    yield from gpu_findings(node, shards, config is not None and config.placement.require_nvlink)


def _links(layout: Layout, fit: Fit, facts: Sequence[NodeFacts]) -> list[Finding]:
    """Measured only where nobody else computes: over what Ray reserves, and on no GPU that others use."""
    if layout.topology.num_ranks == 1:
        return [ok("links", "cluster", "one rank: nothing is exchanged")]
    if fit.node_ids is None:
        words = "what the stages need is held by others" if fit.busy else "the stages do not fit"
        return [not_checked("links", "cluster", words, "run it again when it is free, or before you serve")]
    users = [node.name for node in facts if node.hosts_ranks and foreign_users(node)]
    if users and layout.device == "cuda":
        where = ", ".join(users)
        return [not_checked("links", where, "GPUs are used by others", "run it again when they have ended")]
    try:
        return list(link_findings(layout, measure_links(layout), facts))
    except NotStarted as error:
        return [not_checked("links", "cluster", str(error), "run it again when the nodes are less busy")]
    except ValueError as error:
        remedy = "look at the lines on ports and interfaces, and at the ranks' logs in /tmp/ray/session_latest/logs"
        return [fail("links", "cluster", str(error), remedy)]


def _could_host(node: NodeFree, need: StageNeed) -> bool:
    alone = check([need], "PACK", [node])
    return alone.node_ids is not None or alone.busy


def _room(fit: Fit) -> Finding:
    if fit.node_ids is not None:
        return ok("room for stages", "cluster", f"all fit, on {len(set(fit.node_ids))} nodes")
    lines = fit.explanation.splitlines()
    remedy = lines[-1].removeprefix("what would work: ")
    judged = not_checked if fit.busy else fail
    return judged("room for stages", "cluster", lines[0], remedy)


def _widest(alive: Sequence[NodeFree]) -> Config:
    """Without a config: a stage on each node that has GPUs, with all that the smallest has; else two shards a node."""
    gpus = [node.gpus for node in alive if node.gpus]
    shards, stages = (min(gpus), len(gpus)) if gpus else (2, sum(node.cpus > 0 for node in alive) or 1)
    parallel = {"tensor_parallel_size": shards, "pipeline_parallel_size": stages}
    placement = {"cpus_per_rank": 0.01, "cpus_per_replica": 0.01, "strategy": "STRICT_SPREAD"}
    return Config.model_validate({"model": {"source": "."}, "parallel": parallel, "placement": placement})


def _own_shards(node: NodeFacts, question: Question) -> int | None:
    """Of a stage on this machine's GPUs: as the config says, else all of them. None: without GPUs."""
    found: NodeGpus | None = node.sections.get("gpus")
    count, config = len(found.gpus) + len(found.troubles) if found is not None else 0, question.config
    if (cuda := node.sections.get("cuda")) is not None:  # without a driver NVML knows of none
        count = max(count, cuda.on_bus)
    if config is None:
        return count or None
    wants_gpus = placed_on(config.device) == "cuda" or (config.device == "auto" and count)
    return config.parallel.tensor_parallel_size if wants_gpus else None


def _is_in_a_pod() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ
