"""What Ray says about its nodes, and waiting for them."""

import pytest

ray = pytest.importorskip("ray")

from cluster.placement.nodes import read_nodes, wait_for  # noqa: E402
from cluster.placement.placement import InfeasiblePlacement, NodeFree, StageNeed, resolve_device  # noqa: E402
from tests.serving import until  # noqa: E402

pytestmark = pytest.mark.timeout(120)


def test_the_node_says_what_it_has_and_what_is_free(cluster):
    until(lambda: read_nodes()[0].free_cpus == 2, within_s=10)  # what a test before has given back
    (node,) = read_nodes()
    assert node.alive and node.node_id == ray.get_runtime_context().get_node_id()
    assert (node.cpus, node.gpus, node.labels["zone"]) == (2, 0, "north")
    assert node.free_cpus == 2 and 0 < node.free_memory_bytes <= node.memory_bytes
    assert resolve_device("auto", [node]) == "cpu"


def test_what_is_reserved_is_busy(cluster):
    needs = [StageNeed(2.0, 0, labels={"zone": "in(north,south)"})]
    assert wait_for(needs, "STRICT_PACK", wait_s=20).node_ids == (ray.get_runtime_context().get_node_id(),)
    group = ray.util.placement_group([{"CPU": 1}])
    ray.get(group.ready(), timeout=30)
    busy = [StageNeed(1.5, 0)]
    until(lambda: read_nodes()[0].free_cpus == 1, within_s=10)  # Ray's picture lags behind a little
    with pytest.raises(InfeasiblePlacement, match="busy: CPU"):
        wait_for(busy, "STRICT_PACK", wait_s=0)
    assert wait_for(busy, "STRICT_PACK", wait_s=0, may_be_busy=True).busy
    ray.util.remove_placement_group(group)
    assert wait_for(busy, "STRICT_PACK", wait_s=30).node_ids is not None


def test_absent_is_an_error_at_once(cluster):
    with pytest.raises(InfeasiblePlacement, match="no node has 8 GPUs"):
        wait_for([StageNeed(1.0, 8)], "STRICT_PACK", wait_s=0, may_be_busy=True)


def test_waiting_ends_when_a_node_comes():
    calls = []

    def read():
        calls.append(1)
        return [] if len(calls) < 3 else [NodeFree("id", "new", cpus=4.0, free_cpus=4.0)]

    assert wait_for([StageNeed(3.0, 0)], "PACK", wait_s=60, read=read).node_ids == ("id",)
    assert len(calls) == 3


def test_waiting_ends_with_the_table():
    with pytest.raises(InfeasiblePlacement, match=r"after 0\.2 s: the stage does not fit(.|\n)*no living node"):
        wait_for([StageNeed(3.0, 0)], "PACK", wait_s=0.2, read=list)
