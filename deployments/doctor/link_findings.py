"""What the measured links mean: beside the card's usual figure, this machine's own pairs, and its other stages."""

from collections.abc import Iterator, Sequence
from statistics import median

from cluster.placement.nvlink import unjoined_pairs
from cluster.placement.nvml import NodeGpus
from deployments.doctor.facts import NodeFacts
from deployments.doctor.findings import Finding, Judgement, ok
from deployments.doctor.links import Layout, Measured
from deployments.doctor.usual import usual_all_reduce

_WARN, _FAIL = 0.8, 0.5  # of what it should be
_FEWEST_PEERS = 3  # among fewer, nobody can say which one is the odd one
_GB = 1e9
_REMEDY = "look at NVLink's and the network card's lines above, at the NCCL_* variables, and at what else runs there"


def link_findings(layout: Layout, measured: Measured, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Stages, pairs of GPUs, and hops. On CPUs only figures are shown: they depend on what else runs."""
    facts = {node.address: node for node in nodes}
    on_gpus = layout.device == "cuda"
    yield from _exchanges(layout, measured, facts, on_gpus)
    yield from _pairs(layout, measured, facts)
    yield from _hops(layout, measured, facts, on_gpus)


def _exchanges(
    layout: Layout, measured: Measured, facts: dict[str | None, NodeFacts], on_gpus: bool
) -> Iterator[Finding]:
    topology = layout.topology
    size = topology.tensor_parallel_size
    if size == 1:
        return
    rates = [measured.rates[topology.rank(stage, 0)] for stage in range(topology.pipeline_parallel_size)]
    all_stages = [rate.exchange_bytes_per_s or 0.0 for rate in rates]
    for stage, rate in enumerate(rates):
        first = topology.rank(stage, 0)
        node, found = facts.get(measured.addresses[first]), rate.exchange_bytes_per_s or 0.0
        words = (
            f"stage {stage}, {size} shards: all-reduce of 8 KiB {(rate.exchange_s or 0.0) * 1e6:.0f} µs, "
            f"of large messages {found / _GB:.1f} GB/s (bus)"
        )
        where = node.name if node is not None else measured.addresses[first]
        beside = _beside(found, all_stages, "the other stages")
        if on_gpus and node is not None:
            beside += _beside_the_card(found, node, size, [measured.gpus[r] for r in topology.stage_ranks(stage)])
            own = [rate for (of, _, _), rate in measured.pairs.items() if of == stage]
            beside += [(found / min(own), f"{min(own) / _GB:.0f} GB/s between its slowest two GPUs")] if own else []
        yield _judged("exchange", where, words, beside if on_gpus else [])


def _beside_the_card(found: float, node: NodeFacts, size: int, assigned: list[str | None]) -> list[tuple[float, str]]:
    gpus: NodeGpus | None = node.sections.get("gpus")
    if gpus is None:
        return []
    stage = [at for at, gpu in enumerate(gpus.gpus) if str(gpu.index) in assigned or gpu.uuid in assigned]
    if len(stage) != size or not gpus.joined:  # Ray's names are of slices, or of another numbering
        return []
    name, joined = gpus.gpus[stage[0]].name, [[gpus.joined[a][b] for b in stage] for a in stage]
    usual = usual_all_reduce(name, not unjoined_pairs(joined), size)
    return [(found / usual, f"{usual / _GB:.0f} GB/s, usual for {name}")] if usual else []


def _pairs(layout: Layout, measured: Measured, facts: dict[str | None, NodeFacts]) -> Iterator[Finding]:
    every = list(measured.pairs.values())
    for (stage, a, b), rate in measured.pairs.items():
        node = facts.get(measured.addresses[layout.topology.rank(stage, a)])
        where = node.name if node is not None else "cluster"
        finding = _judged(
            "pairs",
            where,
            f"stage {stage}, shard {a} to {b}: {rate / _GB:.0f} GB/s",
            _beside(rate, every, "the other pairs"),
        )
        if finding.judgement != "ok":
            yield finding
    if every:
        slowest, fastest = min(every) / _GB, max(every) / _GB
        yield ok("pairs", "cluster", f"{len(every)} pairs of GPUs: copies at {slowest:.0f} to {fastest:.0f} GB/s")


def _hops(layout: Layout, measured: Measured, facts: dict[str | None, NodeFacts], on_gpus: bool) -> Iterator[Finding]:
    topology = layout.topology
    every = [rate.hop_bytes_per_s for rate in measured.rates if rate.hop_bytes_per_s is not None]
    for stage in range(1, topology.pipeline_parallel_size):
        ranks = topology.stage_ranks(stage)
        rates = [measured.rates[rank].hop_bytes_per_s or 0.0 for rank in ranks]
        ends = [measured.addresses[rank] for rank in (topology.previous_rank(ranks[0]), ranks[0])]
        names = [facts[end].name if end in facts else end for end in ends]
        where = names[0] if ends[0] == ends[1] else " → ".join(names)
        words = f"stage {stage - 1} to {stage}: {min(rates) / _GB:.2f} GB/s a shard"
        yield _judged("hops", where, words, _beside(min(rates), every, "the other hops") if on_gpus else [])
    trips = [rate.trip_s for rate in measured.rates if rate.trip_s is not None]
    if trips:
        once = max(trips) * 1e6
        stages = topology.pipeline_parallel_size
        yield ok("hops", "cluster", f"8 KiB through {stages} stages and back: {once:.0f} µs, {once / stages:.0f} a hop")


def _beside(found: float, every: Sequence[float], whose: str) -> list[tuple[float, str]]:
    if len(every) < _FEWEST_PEERS:
        return []
    usual = median(every)
    return [(found / usual, f"{usual / _GB:.1f} GB/s, the median of {whose}")] if usual else []


def _judged(check: str, where: str, words: str, beside: Sequence[tuple[float, str]]) -> Finding:
    """By the worst of several comparisons, each (share of what it should be, what that is)."""
    if not beside:
        return ok(check, where, words)
    share, what = min(beside)
    judgement: Judgement = "fail" if share < _FAIL else "warn" if share < _WARN else "ok"
    return Finding(check, where, judgement, f"{words}: {share:.0%} of {what}", "" if judgement == "ok" else _REMEDY)
