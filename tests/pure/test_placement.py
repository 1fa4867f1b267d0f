"""Placement: what Ray is asked for, whether it fits, and what people are told when it does not."""

import itertools
import random
import re

import pytest

from cluster.placement.packing import pack, spread
from cluster.placement.placement import (
    NodeFree,
    StageNeed,
    check,
    make_bundles,
    make_label_selectors,
    make_needs,
    resolve_device,
    resolve_strategy,
)
from cluster.placement.resources import matches
from cluster.topology import Topology
from configs.config import PlacementConfig

pytestmark = pytest.mark.timeout(60)
GIB = 1 << 30
DEFAULTS = PlacementConfig()


def node(name, cpus=32.0, gpus=0, memory=64, free_cpus=None, free_gpus=None, alive=True, **labels):
    return NodeFree(
        node_id=name,
        name=name,
        alive=alive,
        cpus=cpus,
        gpus=gpus,
        memory_bytes=memory * GIB,
        free_cpus=cpus if free_cpus is None else free_cpus,
        free_gpus=gpus if free_gpus is None else free_gpus,
        free_memory_bytes=memory * GIB,
        labels={key.replace("_", "-"): value for key, value in labels.items()},
    )


def needs_of(tensor_parallel, pipeline_parallel, device="cuda", memory_bytes=None, **keys):
    topology = Topology(tensor_parallel, pipeline_parallel)
    return make_needs(topology, PlacementConfig(**keys), device, memory_bytes)


def test_one_bundle_a_stage_and_the_replica_in_the_first():
    assert make_bundles(needs_of(4, 3)) == [{"CPU": 5, "GPU": 4}, {"CPU": 4, "GPU": 4}, {"CPU": 4, "GPU": 4}]
    assert make_bundles(needs_of(2, 2, "cpu", cpus_per_rank=0.5, cpus_per_replica=2)) == [{"CPU": 3}, {"CPU": 1}]
    reserving = needs_of(1, 2, "cpu", memory_bytes=[5, 7])
    assert make_bundles(reserving) == [{"CPU": 2, "memory": 5}, {"CPU": 1, "memory": 7}]


def test_a_bundle_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"placement\.cpus_per_rank"):
        needs_of(2, 2, "cpu", cpus_per_rank=0)
    assert make_bundles(needs_of(2, 2, "cuda", cpus_per_rank=0)) == [{"CPU": 1, "GPU": 2}, {"GPU": 2}]


def test_label_selectors_are_one_a_bundle():
    assert make_label_selectors(needs_of(1, 2)) is None
    selector = {"ray.io/accelerator-type": "H100"}
    assert make_label_selectors(needs_of(1, 2, label_selector=selector)) == [selector, selector]


def test_strategy_and_device_are_resolved():
    assert resolve_strategy(DEFAULTS, Topology(8, 1)) == "STRICT_PACK"
    assert resolve_strategy(DEFAULTS, Topology(8, 2)) == "PACK"
    assert resolve_strategy(PlacementConfig(strategy="STRICT_SPREAD"), Topology(8, 1)) == "STRICT_SPREAD"
    assert resolve_device("auto", [node("a"), node("b", gpus=8)]) == "cuda"
    assert resolve_device("auto", [node("a"), node("b", gpus=8, alive=False)]) == "cpu"
    assert resolve_device("cpu", [node("b", gpus=8)]) == "cpu"


@pytest.mark.parametrize(
    ("wanted", "label", "answer"),
    [
        ("H100", "H100", True),
        ("H100", "A100", False),
        ("H100", None, False),
        ("!H100", "A100", True),
        ("!H100", "H100", False),
        ("!H100", None, True),
        ("in(A100, H100)", "H100", True),
        ("in(A100,H100)", "B200", False),
        ("in(A100,H100)", None, False),
        ("!in(A100,H100)", "B200", True),
        ("!in(A100,H100)", "A100", False),
        ("!in(A100,H100)", None, True),
    ],
)
def test_labels_match_as_in_ray(wanted, label, answer):
    assert matches({"key": wanted}, {} if label is None else {"key": label}) is answer


def test_strategies_differ_in_who_may_share_a_node():
    needs = needs_of(4, 2)
    one_large, two_small = [node("large", gpus=8)], [node("small-1", gpus=4), node("small-2", gpus=4)]
    assert check(needs, "PACK", one_large).node_ids == ("large", "large")
    assert check(needs, "STRICT_PACK", one_large).node_ids == ("large", "large")
    assert check(needs, "STRICT_SPREAD", one_large).node_ids is None
    assert set(check(needs, "PACK", two_small).node_ids) == {"small-1", "small-2"}
    assert check(needs, "STRICT_PACK", two_small).node_ids is None
    assert set(check(needs, "STRICT_SPREAD", two_small).node_ids) == {"small-1", "small-2"}


def test_the_first_stage_is_not_forgotten_in_tight_nodes():
    """The replica's CPU makes the first bundle fit one node only: a greedy search that fills it first fails."""
    nodes = [node("tight", cpus=4, gpus=4), node("roomy", cpus=5, gpus=4)]
    for strategy in ("PACK", "STRICT_SPREAD"):
        assert check(needs_of(4, 2), strategy, nodes).node_ids == ("roomy", "tight")


def test_a_group_never_spans_nodes():
    fit = check(needs_of(8, 1), "STRICT_PACK", [node("a", gpus=4), node("b", gpus=4)])
    assert fit.node_ids is None and not fit.busy
    assert "no node has 8 GPUs; the largest has 4: set parallel.tensor_parallel_size to at most 4" in fit.explanation


def test_the_table_says_needs_and_nodes_and_sums():
    nodes = [
        node("head", cpus=2, memory=8),
        node("gpu-1", cpus=32, gpus=4, memory=120, free_cpus=31.5, free_gpus=1),
        node("gpu-2", gpus=4, alive=False),
    ]
    text = check(needs_of(4, 3), "PACK", nodes).explanation
    assert [re.sub(r" +", " ", line).strip() for line in text.splitlines()] == [
        "the 3 stages do not fit the cluster (strategy PACK)",
        "CPU GPU memory",
        "stage 0 5 4 0",
        "stages 1-2, each 4 4 0",
        "sum 13 12 0",
        "",
        "free / has CPU GPU memory",
        "head 2 / 2 0 / 0 8.0 GiB / 8.0 GiB too small: CPU, GPU",
        "gpu-1 31.5 / 32 1 / 4 120.0 GiB / 120.0 GiB busy: GPU",
        "gpu-2 32 / 32 4 / 4 64.0 GiB / 64.0 GiB dead",
        "sum 33.5 / 34 1 / 4 128.0 GiB / 128.0 GiB 2 alive",
        "",
        (
            "what would work: each stage fits alone, but not all 3 together: add nodes, or lower "
            "parallel.pipeline_parallel_size or placement.cpus_per_rank"
        ),
    ]


def test_alike_nodes_share_a_row():
    text = check(needs_of(8, 1), "STRICT_PACK", [node(f"n{i}", gpus=4) for i in range(1000)]).explanation
    assert "1000 nodes like n0" in text and len(text.splitlines()) < 12


@pytest.mark.parametrize(
    ("needs", "strategy", "nodes", "remedy"),
    [
        (needs_of(2, 1), "STRICT_PACK", [], "no living node"),
        (needs_of(2, 1), "STRICT_PACK", [node("a", gpus=2, alive=False)], "no living node"),
        (needs_of(8, 1), "STRICT_PACK", [node("a")], "no node has 8 GPUs; the largest has 0: set device to cpu"),
        (needs_of(4, 1, "cpu"), "STRICT_PACK", [node("a", cpus=2)], "no node has 5 CPUs; the largest has 2"),
        (needs_of(1, 1, "cpu", memory_bytes=[90 * GIB]), "STRICT_PACK", [node("a")], "no node has 90.0 GiB of memory"),
        (
            needs_of(1, 1, label_selector={"type": "H100"}),
            "STRICT_PACK",
            [node("a", gpus=1, type="A100"), node("b", gpus=1)],
            "no node has the labels type=H100 (there are: type=A100)",
        ),
        (needs_of(4, 2), "STRICT_SPREAD", [node("a", gpus=8)], "set placement.strategy to PACK"),
        (needs_of(4, 2), "STRICT_PACK", [node("a", gpus=4), node("b", gpus=4)], "set placement.strategy to PACK"),
        (needs_of(4, 3), "PACK", [node("a", gpus=8)], "not all 3 together: add nodes"),
        (needs_of(4, 1), "STRICT_PACK", [node("a", gpus=4, cpus=2), node("b")], "no single node has all"),
    ],
)
def test_the_last_line_says_what_would_work(needs, strategy, nodes, remedy):
    fit = check(needs, strategy, nodes)
    assert fit.node_ids is None and not fit.busy
    assert fit.explanation.splitlines()[-1].startswith("what would work: ")
    assert remedy in fit.explanation.splitlines()[-1]


def test_busy_is_told_from_absent():
    fit = check(needs_of(4, 1), "STRICT_PACK", [node("a", gpus=4, free_gpus=3)])
    assert fit.node_ids is None and fit.busy
    assert "busy: GPU" in fit.explanation and "placement.wait_s" in fit.explanation
    assert "do not fit" in check(needs_of(4, 2), "PACK", [node("a", gpus=8, free_gpus=4)]).explanation


def test_a_shared_gpu_is_not_a_free_one():
    assert check(needs_of(1, 1), "STRICT_PACK", [node("a", gpus=1, free_gpus=0.5)]).busy


def test_tenths_of_cpus_add_up():
    needs = [StageNeed(0.1, 0) for _ in range(3)]
    assert check(needs, "STRICT_PACK", [node("a", cpus=0.3)]).node_ids == ("a", "a", "a")
    assert check(needs, "PACK", [node("a", cpus=0.3)]).node_ids == ("a", "a", "a")


def is_valid(chosen, asked, room, allowed):
    load = [[0] * 3 for _ in room]
    for bundle, host in enumerate(chosen):
        if not allowed[bundle][host]:
            return False
        load[host] = [a + b for a, b in zip(load[host], asked[bundle], strict=True)]
    return all(used <= has for loads, has in zip(load, room, strict=True) for used, has in zip(loads, has, strict=True))


@pytest.mark.parametrize("seed", range(300))
def test_the_search_agrees_with_brute_force(seed):
    world = random.Random(seed)
    kinds = [tuple(world.randint(0, 4) for _ in range(3)) for _ in range(world.randint(1, 3))]
    asked = [world.choice(kinds) for _ in range(world.randint(1, 5))]
    room = [tuple(world.randint(0, 8) for _ in range(3)) for _ in range(world.randint(1, 4))]
    rows = [[world.random() < 0.8 for _ in room] for _ in kinds]
    allowed = [rows[kinds.index(amounts)] for amounts in asked]
    ways = itertools.product(range(len(room)), repeat=len(asked))
    every = [chosen for chosen in ways if is_valid(chosen, asked, room, allowed)]
    packed, apart = pack(asked, room, allowed), spread(asked, room, allowed)
    assert (packed is not None) == bool(every)
    assert packed is None or tuple(packed) in every
    distinct = [c for c in every if len(set(c)) == len(c)]
    assert (apart is not None) == bool(distinct)
    assert apart is None or tuple(apart) in distinct


@pytest.mark.timeout(60)
@pytest.mark.parametrize("strategy", ["PACK", "STRICT_SPREAD"])
@pytest.mark.parametrize("num_sizes", [1, 4, 64])
def test_large_clusters_are_checked_in_no_time(strategy, num_sizes):
    """64 stages on 1000 partly busy nodes: hopeless, tight and easy; without bounds this search takes minutes."""
    world = random.Random(num_sizes)
    nodes = [
        node(f"n{i}", cpus=96, gpus=8, memory=world.randint(20, 60), free_gpus=world.choice([0, 0, 4, 8]))
        for i in range(1000)
    ]
    memory = [world.choice(range(20, 20 + num_sizes)) * GIB // 2 for _ in range(64)]
    assert check(needs_of(16, 64, memory_bytes=memory), strategy, nodes).node_ids is None
    chosen = check(needs_of(8, 64, memory_bytes=memory), strategy, nodes).node_ids
    assert chosen is not None and len(set(chosen)) == 64
