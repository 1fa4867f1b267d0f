"""What nodes are to each other: versions, clocks, ways between ports, and room for the stages."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deployments.doctor.facts import NodeFacts
from deployments.doctor.findings import Finding, fail, not_checked, ok, warn

_SKEW_S = 1.0
_MAY_DIFFER = ("kernel",)  # a warning only
_ONE_IMAGE = "use one image, or one checkout and its `.venv`, on all nodes"
_REMEDIES = {"driver": "install one driver on all nodes", "kernel": "none is needed, as long as the links are fast"}


@dataclass(frozen=True)
class Way:
    """Whether one node reaches a port of another."""

    source: str
    target: str
    port: int
    what: str
    error: str | None  # None: it does
    is_tried: bool = True  # else `error` is why nobody listens at the target


def cluster_findings(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Of all nodes together."""
    for node in nodes:
        if node.is_silent is not None:
            yield fail(
                "node",
                node.name,
                node.is_silent,
                "look at `ray status` and the raylet's log there; give it the checkout and packages of the others",
            )
    yield from _versions([node for node in nodes if node.is_silent is None])
    yield from _clocks(nodes)


def _versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for node in nodes:
        versions = dict(node.sections.get("versions", {}))
        if node.sections.get("gpus") is not None:
            versions["driver"] = node.sections["gpus"].driver
        for name, value in versions.items():
            found[name][value].append(node.name)
    differing = {name: values for name, values in found.items() if len(values) > 1}
    for name, values in differing.items():
        words = "; ".join(f"{value} on {', '.join(where)}" for value, where in sorted(values.items()))
        judged = warn if name in _MAY_DIFFER else fail
        yield judged("versions", "cluster", f"{name} differs: {words}", _REMEDIES.get(name, _ONE_IMAGE))
    if found and not differing:
        shown = ", ".join(f"{name} {next(iter(found[name]))}" for name in found if name != "kernel")
        yield ok("versions", "cluster", shown)


def _clocks(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    measured = [(node, node.skew_s) for node in nodes if node.skew_s is not None]
    far = [(node, skew_s) for node, skew_s in measured if abs(skew_s) - node.skew_error_s > _SKEW_S]
    for node, skew_s in far:
        yield warn(
            "clock", node.name, f"{skew_s:+.1f} s beside this machine's", "run chrony or another NTP client there"
        )
    if measured and not far:
        most = max(abs(skew_s) for _, skew_s in measured)
        error = max(node.skew_error_s for node, _ in measured)
        yield ok("clock", "cluster", f"all within {most:.3f} s of this machine's (measured to {error:.3f} s)")


def way_findings(ways: Sequence[Way], names: Mapping[str, str]) -> Iterator[Finding]:
    """Of the ports that were tried, from each node to each. `names` of nodes by address."""
    tried = [way for way in ways if way.is_tried]
    for way in ways:
        if not way.is_tried:
            where, found = names.get(way.target, way.target), f"port {way.port} ({way.what}): {way.error}"
            yield not_checked("ports", where, found, "run it again before you serve, or try that port by hand")
        elif way.error is not None:
            source, target = names.get(way.source, way.source), names.get(way.target, way.target)
            yield fail(
                "ports",
                f"{source} → {target}",
                f"port {way.port} of {way.target} ({way.what}) is not reached: {way.error}",
                f"open it between the nodes (firewall, security group, NetworkPolicy): {NEEDED}",
            )
    if tried and all(way.error is None for way in tried):
        pairs = len({(way.source, way.target) for way in tried})
        yield ok("ports", "cluster", f"{len(tried)} connections over {pairs} ways between nodes, each way: all reached")


NEEDED = (
    "between all nodes 6379 (Ray), 10002-19999 and the kernel's own ports (workers and ranks); from the HTTP proxy's "
    "node to the others 30000-31000"
)
