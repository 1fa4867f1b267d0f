"""Joining, talking, failing and joining again: rank processes with real sockets."""

import contextlib
import functools
import os
import runpy
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

import cluster.collectives.cpu_transport as cpu_transport
import cluster.collectives.shared_memory as shared_memory
from cluster.collectives.groups import join
from cluster.collectives.process_group import TorchStage
from cluster.collectives.rendezvous import host_store, join_store
from cluster.collectives.shared_memory import SharedMemoryStage
from cluster.collectives.socket_link import connect_links
from cluster.topology import Topology

ADDRESS = "127.0.0.1"
OTHER_ADDRESS = "127.0.0.2"  # on Linux all of 127/8 is this machine: stands for the second interface of a node
CPU = torch.device("cpu")

pytestmark = [pytest.mark.timeout(90), pytest.mark.all_cores]


@pytest.fixture
def run():
    """run(scenario, num_ranks, **arguments) → what came of each rank; the ranks meet at a store of their own."""
    run_ranks = runpy.run_path(str(Path(__file__).with_name("group_process.py")))["run_ranks"]
    store, port = host_store(ADDRESS)
    yield functools.partial(run_ranks, __file__, port=port)
    del store


def join_all(rank, port, layout, epoch=1, timeout_s=20.0, address=ADDRESS, shared=True):
    if not shared:
        cpu_transport.share_memory = lambda *_: None  # as where memory cannot be shared
    store = join_store(ADDRESS, port, epoch, 20.0)
    return join(Topology(*layout), rank, store, CPU, address, timeout_s)


@contextlib.contextmanager
def leaving_after(port, rank, first):
    """A rank stays in its scenario, and so alive, until rank `first` has left, whatever became of that one."""
    store = join_store(ADDRESS, port, 1, 20.0)
    try:
        yield
    finally:
        if rank == first:
            store.put("left", rank)
        else:
            store.take("left")


def use(groups, topology, rank):
    """One step's worth of talk; everything is checked."""
    stage, shard = topology.stage(rank), topology.shard(rank)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        total = groups.stage.all_reduce(torch.full((5,), shard + 1, dtype=dtype))
        size = topology.tensor_parallel_size
        assert total.tolist() == [size * (size + 1) // 2] * 5
    assert groups.stage.all_gather(torch.tensor([shard])).tolist() == [[s] for s in range(groups.stage.size)]
    hidden = torch.full((3, 4), float(shard), dtype=torch.bfloat16)
    if groups.previous is not None:
        groups.previous.receive(hidden)
    assert hidden.tolist() == [[shard + stage] * 4] * 3
    if groups.next is not None:
        groups.next.send(hidden + 1).wait()
    use_feedback(groups, topology, rank)
    groups.control.barrier()


def use_feedback(groups, topology, rank):
    """The first stage hears what the last one says, twice before it is asked for an answer."""
    is_first, is_last = topology.is_first_stage(rank), topology.is_last_stage(rank)
    assert (groups.feedback is not None) == (is_first != is_last)
    if groups.feedback is None:
        return
    for number in range(2):
        if is_last:
            groups.feedback.send(torch.tensor([rank, number])).wait()
    for number in range(2):
        if is_first:
            ids = torch.zeros(2, dtype=torch.int64)
            groups.feedback.receive(ids)
            last_stage = topology.pipeline_parallel_size - 1
            assert ids.tolist() == [topology.rank(last_stage, topology.shard(rank)), number]


# Scenarios: what a rank does


def join_and_rejoin(rank, port, layout, shared):
    topology = Topology(*layout)
    kinds = []
    for epoch in (1, 2, 3):
        groups = join_all(rank, port, layout, epoch, shared=shared)
        use(groups, topology, rank)
        kinds.append(type(groups.stage).__name__)
        if epoch == 2:
            groups.abort()  # survivors of a failure leave so
        groups.close()
        groups.close()
    return kinds


def join_where_memory_is_out_of_reach(rank, port):
    if rank == 1:
        shared_memory._map_theirs = lambda *_: (_ for _ in ()).throw(OSError("not allowed"))
    groups = join_all(rank, port, (2, 1))
    assert isinstance(groups.stage, TorchStage) and not isinstance(groups.stage, SharedMemoryStage)
    use(groups, Topology(2, 1), rank)


def join_without_rank_1(rank, port):
    if rank == 1:
        return
    join(Topology(3, 1), rank, join_store(ADDRESS, port, 1, 3.0), CPU, ADDRESS, 10.0)


def join_until_cancelled(rank, port):
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    join(Topology(2, 1), rank, join_store(ADDRESS, port, 1, 60.0, cancelled), CPU, ADDRESS, 10.0)


def listening_addresses():
    sockets = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:  # the listing's own
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:
                raw = bytes.fromhex(columns[1].split(":")[0])
                addresses.add(socket.inet_ntoa(raw[::-1]) if len(raw) == 4 else raw.hex())
    return addresses


def listen_somewhere(rank, port, address, shared):
    groups = join_all(rank, port, (2, 2), address=address, shared=shared)
    use(groups, Topology(2, 2), rank)
    addresses = listening_addresses()
    groups.control.barrier()
    return addresses


def receive_nothing(rank, port, how):
    groups = join_all(rank, port, (1, 2), timeout_s=1.0 if how == "timeout" else 30.0)
    if rank == 0 and how == "death":
        os._exit(7)
    with leaving_after(port, rank, first=1):
        if rank == 0:
            if how == "wrong size":
                groups.next.send(torch.ones(3)).wait()
            return
        if how == "abort":
            threading.Timer(0.3, groups.abort).start()
        groups.previous.receive(torch.ones(4))


def wait_for_feedback(rank, port, how):
    groups = join_all(rank, port, (1, 3), timeout_s=1.0 if how == "timeout" else 30.0)
    if rank == 2 and how == "death":
        os._exit(7)
    with leaving_after(port, rank, first=0):
        if rank == 0:
            if how == "abort":
                threading.Timer(0.3, groups.abort).start()
            groups.feedback.receive(torch.ones(4))


def send_much(rank, port):
    groups = join_all(rank, port, (1, 2))
    large = torch.arange(6_000_000)
    if rank == 0:
        sendings = [groups.next.send(large + number) for number in range(3)]  # more than any socket's buffer
        sendings.append(groups.next.send(torch.tensor([7])))
        for sending in sendings:
            sending.wait()
        groups.close()  # what was sent arrives all the same
        return None
    time.sleep(0.3)
    for number in range(3):
        received = torch.empty_like(large)
        groups.previous.receive(received)
        assert torch.equal(received, large + number)
    last = torch.zeros(1, dtype=torch.int64)
    groups.previous.receive(last)
    return last.item()


def send_to_a_hanging_neighbor(rank, port):
    groups = join_all(rank, port, (1, 2), timeout_s=0.7)
    with leaving_after(port, rank, first=0):
        if rank == 0:
            groups.next.send(torch.ones(20_000_000)).wait()


def knock_as_a_stranger(rank, port):
    store = join_store(ADDRESS, port, 1, 20.0)
    if rank == 0:  # a scanner, before the neighbor comes
        address, door, token = store.take("link/to1")
        strangers = [socket.create_connection((address, door)) for _ in range(2)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(4096))
        _, link = connect_links(store, 0, None, 1, ADDRESS, 10.0)
        link.send(torch.ones(3)).wait()
        assert len(token) == 32
        return []
    link, _ = connect_links(store, 1, 0, None, ADDRESS, 10.0)
    received = torch.zeros(3)
    link.receive(received)
    return received.tolist()


def stage_fails(rank, port, how):
    """On gloo, as where there is no shared memory."""
    groups = join_all(rank, port, (2, 1), timeout_s=1.0 if how == "timeout" else 30.0, shared=False)
    if rank == 1 and how == "death":
        os._exit(7)
    with leaving_after(port, rank, first=0):
        if rank == 1:
            return
        if how == "abort":
            threading.Timer(0.3, groups.abort).start()
        began = time.monotonic()
        try:
            groups.stage.all_reduce(torch.ones(4))
        finally:
            groups.close()
            assert time.monotonic() - began < 20  # the group's own patience is 30 s


# Tests


def is_ok(answers):
    assert [kind for kind, _ in answers] == ["ok"] * len(answers), answers
    return [result for _, result in answers]


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (3, 2)])
def test_every_layout_talks_and_rejoins_at_later_epochs(run, layout):
    kinds = is_ok(run("join_and_rejoin", layout[0] * layout[1], layout=layout, shared=True))
    assert {kind for rank in kinds for kind in rank} == {"LoneShard" if layout[0] == 1 else "SharedMemoryStage"}


def test_gloo_takes_the_stage_when_shared_memory_is_not_wanted(run):
    kinds = is_ok(run("join_and_rejoin", 4, layout=(2, 2), shared=False))
    assert kinds == [["TorchStage"] * 3] * 4


def test_gloo_takes_the_stage_when_one_shard_cannot_share_memory(run):
    is_ok(run("join_where_memory_is_out_of_reach", 2))


def test_a_device_without_a_transport_is_refused():
    with pytest.raises(ValueError, match="on cpu and cuda only, not on meta"):
        join(Topology(1, 1), 0, None, torch.device("meta"), ADDRESS, 1.0)


def test_missing_rank_is_named(run):
    answers = run("join_without_rank_1", 3)
    for kind, text in (answers[0], answers[2]):
        assert kind == "TimeoutError" and text.endswith("nobody said ranks/rank1")


def test_a_rank_can_be_called_back_while_it_waits(run):
    assert run("join_until_cancelled", 1) == [("JoinCancelled", "epoch 1 was given up")]


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_listens_on_another_address(run, shared):
    for addresses in is_ok(run("listen_somewhere", 4, address=OTHER_ADDRESS, shared=shared)):
        assert addresses == {OTHER_ADDRESS}  # gloo's own listener; the doors of links are closed by now


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("timeout", "NeighborLate", "link 0 to 1: no byte moved for 1 s"),
        ("abort", "NeighborLost", "link 0 to 1: aborted"),
        ("death", "NeighborLost", "link 0 to 1: the neighbor closed it or died"),
        ("wrong size", "RuntimeError", "link 0 to 1: hop 1 brings 12 bytes, but hop 1 of 16 was expected"),
    ],
)
def test_receive_leaves_when_nothing_comes(run, how, error, text):
    answers = run("receive_nothing", 2, how=how)
    assert answers[1] == (error, text)
    assert answers[0] == (("dead", 7) if how == "death" else ("ok", None))


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("timeout", "NeighborLate", "feedback 2 to 0: no byte moved for 1 s"),
        ("abort", "NeighborLost", "feedback 2 to 0: aborted"),
        ("death", "NeighborLost", "feedback 2 to 0: the neighbor closed it or died"),
    ],
)
def test_the_first_stage_leaves_when_no_feedback_comes(run, how, error, text):
    answers = run("wait_for_feedback", 3, how=how)
    assert answers[0] == (error, text)


def test_sends_that_no_buffer_holds_arrive_in_order(run):
    assert is_ok(run("send_much", 2)) == [None, 7]


def test_send_to_a_neighbor_that_hangs_times_out(run):
    kind, text = run("send_to_a_hanging_neighbor", 2)[0]
    assert kind == "NeighborLate" and text.startswith("link 0 to 1")


def test_strangers_at_the_door_are_refused(run):
    assert is_ok(run("knock_as_a_stranger", 2)) == [[], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("timeout", "NeighborLate", "stage0: not done within 1 s"),
        ("abort", "NeighborLost", "stage0: aborted"),
        ("death", "NeighborLost", "stage0: "),
    ],
)
def test_gloo_stage_leaves_when_a_shard_does_not_come(run, how, error, text):
    kind, message = run("stage_fails", 2, how=how)[0]
    assert kind == error and message.startswith(text)


def test_store_listens_at_its_own_address_only():
    store, port = host_store(OTHER_ADDRESS)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((ADDRESS, port), timeout=5).close()
    with pytest.raises(TimeoutError, match=f"no rendezvous at {ADDRESS} port {port}"):
        join_store(ADDRESS, port, 1, 0.5)
    member = join_store(OTHER_ADDRESS, port, 1, 5.0)
    member.put("word", {"a": [1, None]})
    assert member.take("word") == {"a": [1, None]}
    del store


def test_store_refuses_an_address_of_another_node():
    with pytest.raises(ValueError, match=r"cannot listen at 203\.0\.113\.7.*an address of this node"):
        host_store("203.0.113.7")


def test_epochs_do_not_see_each_other():
    store, port = host_store(ADDRESS)
    join_store(ADDRESS, port, 1, 0.3).put("word", 1)
    with pytest.raises(TimeoutError, match=r"epoch 2: after 0\.3 s nobody said word"):
        join_store(ADDRESS, port, 2, 0.3).take("word")
    assert join_store(ADDRESS, port, 1, 0.3).take("word") == 1
    del store
