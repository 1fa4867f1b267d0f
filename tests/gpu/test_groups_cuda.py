"""NCCL behind the same interfaces: one rank a GPU, as many as the machine has."""

import functools
import runpy
from pathlib import Path

import pytest
import torch

from cluster.collectives.groups import join
from cluster.collectives.process_group import NcclGroup, TorchStage
from cluster.collectives.rendezvous import host_store, join_store
from cluster.topology import Topology

ADDRESS = "127.0.0.1"
NUM_GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(NUM_GPUS == 0, reason="needs a GPU"),
]


@pytest.fixture
def run():
    """run(scenario, num_ranks, **arguments) → what came of each rank."""
    helper = Path(__file__).parent.parent / "cpu" / "group_process.py"
    store, port = host_store(ADDRESS)
    yield functools.partial(runpy.run_path(str(helper))["run_ranks"], __file__, port=port)
    del store


def talk_alone(rank, port):
    """A group of one: the whole way through NCCL, on a machine with one GPU."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = join_store(ADDRESS, port, 1, 30.0)
    stage = TorchStage(NcclGroup("stage0", store, [0], 0, device, 30.0))
    total = stage.all_reduce(torch.full((5,), 3.0, device=device))
    gathered = stage.all_gather(torch.arange(4, device=device))
    result = total.tolist(), gathered.tolist()
    stage.close()
    stage.close()
    return result


def join_and_rejoin(rank, port, layout):
    topology = Topology(*layout)
    device = torch.device("cuda", rank)
    results = []
    for epoch in (1, 2):
        groups = join(topology, rank, join_store(ADDRESS, port, epoch, 60.0), device, ADDRESS, 60.0)
        shard, stage = topology.shard(rank), topology.stage(rank)
        total = groups.stage.all_reduce(torch.full((5,), float(shard), device=device))
        hidden = torch.full((2, 3), float(stage), device=device)
        if groups.previous is not None:
            groups.previous.receive(hidden)
        if groups.next is not None:
            groups.next.send(hidden + 1).wait()
        returned = torch.full((2,), -1, device=device)
        if groups.feedback is not None and topology.is_last_stage(rank):
            groups.feedback.send(torch.full((2,), rank, device=device)).wait()
        elif groups.feedback is not None:
            groups.feedback.receive(returned)
            assert returned.tolist() == [topology.rank(layout[1] - 1, shard)] * 2
        results.append((total.tolist(), hidden.tolist()))
        groups.close()
    return results


def test_a_group_of_one_talks_through_nccl(run):
    assert run("talk_alone", 1) == [("ok", ([3.0] * 5, [[0, 1, 2, 3]]))]


def test_a_lone_rank_joins_on_cuda(run):
    assert run("join_and_rejoin", 1, layout=(1, 1)) == [("ok", [([0.0] * 5, [[0.0] * 3] * 2)] * 2)]


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
def test_two_ranks_talk_and_rejoin(run, layout):
    answers = run("join_and_rejoin", 2, layout=layout)
    total = sum(range(layout[0]))
    for rank, answer in enumerate(answers):
        stage = Topology(*layout).stage(rank)
        assert answer == ("ok", [([float(total)] * 5, [[float(stage)] * 3] * 2)] * 2)
