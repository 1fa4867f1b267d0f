"""The all-reduce and all-gather over shared memory, in real processes."""

import functools
import os
import runpy
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

import cluster.collectives.shared_memory as shared_memory
from cluster.collectives.process_group import GlooGroup, TorchStage
from cluster.collectives.rendezvous import host_store, join_store
from cluster.collectives.shared_memory import BUFFER_BYTES, SharedMemoryStage, share_memory

ADDRESS = "127.0.0.1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
SHAPES = [(1,), (), (7,), (3, 5, 11), (0,), (BUFFER_BYTES // 2 + 13,)]  # the last one takes several pieces

pytestmark = [pytest.mark.timeout(90), pytest.mark.all_cores]


@pytest.fixture
def run():
    """run(scenario, num_ranks, **arguments) → what became of each rank; the ranks meet at a store of their own."""
    run_ranks = runpy.run_path(str(Path(__file__).with_name("group_process.py")))["run_ranks"]
    store, port = host_store(ADDRESS)
    yield functools.partial(run_ranks, __file__, port=port)
    del store


def join(rank, size, port, timeout_s=20.0):
    mapping = share_memory(join_store(ADDRESS, port, 1, 20.0), 0, size, rank)
    assert mapping is not None
    return SharedMemoryStage(mapping, size, rank, timeout_s)


def contribution(shard, shape, dtype):
    generator = torch.Generator().manual_seed(1000 * shard + len(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-(2**40), 2**40, shape, generator=generator, dtype=dtype)


def results_of(values):
    """Exact contents, whatever the dtype."""
    return [value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in values]


# Scenarios: what a rank does


def sum_everything(rank, size, port):
    group = join(rank, size, port)
    sums = [group.all_reduce(contribution(rank, shape, dtype)) for dtype in DTYPES for shape in SHAPES]
    group.close()
    group.close()
    group.abort()
    return results_of(sums)


def gather_everything(rank, size, port):
    group = join(rank, size, port)
    gathered = [group.all_gather(contribution(rank, shape, dtype)) for dtype in DTYPES for shape in SHAPES]
    assert [tuple(g.shape) for g in gathered] == [(size, *shape) for _ in DTYPES for shape in SHAPES]
    return results_of(gathered)


def sum_often(rank, size, port, num_operations):
    group = join(rank, size, port)
    for number in range(num_operations):
        tensor = torch.full((33,), float(rank + number))
        group.all_reduce(tensor)
        expected = size * number + size * (size - 1) // 2
        assert torch.equal(tensor, torch.full((33,), float(expected))), number
        assert group.all_gather(torch.tensor([rank, number])).tolist() == [[s, number] for s in range(size)]


def wait_for_nobody(rank, size, port):
    group = join(rank, size, port, timeout_s=0.5)
    group.all_reduce(torch.ones(3))
    if rank == 1:
        return None
    with pytest.raises(TimeoutError) as first:
        group.all_reduce(torch.ones(3))
    with pytest.raises(RuntimeError, match="timed out"):
        group.all_reduce(torch.ones(3))
    return str(first.value)


def lose_neighbor(rank, size, port):
    group = join(rank, size, port, timeout_s=1.0)
    group.all_reduce(torch.ones(3))
    if rank == 1:
        os._exit(7)
    group.all_reduce(torch.ones(3))


def abort_from_a_thread(rank, size, port):
    group = join(rank, size, port, timeout_s=60.0)
    if rank == size - 1:
        threading.Timer(0.2, group.abort).start()
        time.sleep(0.4)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=f"aborted by shard {size - 1}"):
        group.all_reduce(torch.ones(3))
    with pytest.raises(RuntimeError, match="aborted"):
        group.all_gather(torch.ones(3))
    return time.monotonic() - began


def disagree(rank, size, port, kind):
    group = join(rank, size, port)
    group.all_reduce(torch.ones(4))
    if rank == 0:
        group.all_reduce(torch.ones(4))
    elif kind == "size":
        group.all_reduce(torch.ones(5))
    elif kind == "dtype":
        group.all_reduce(torch.ones(8, dtype=torch.bfloat16))
    elif kind == "operation":
        group.all_gather(torch.ones(4))


def wait_while_a_thread_works(rank, size, port):
    group = join(rank, size, port)
    if rank == 1:
        time.sleep(1.0)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.01):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    group.all_reduce(torch.ones(3))
    stop.set()
    thread.join()
    return len(ticks)


def look_at_names(rank, size, port):
    before = set(Path("/dev/shm").iterdir())
    group = join(rank, size, port)
    group.all_reduce(torch.ones(3))
    new = [path.name for path in set(Path("/dev/shm").iterdir()) - before if "stagemesh" in path.name]
    assert "stagemesh" in Path("/proc/self/maps").read_text()
    group.close()
    del group
    left = "stagemesh" in Path("/proc/self/maps").read_text()
    return new, left, [target for target in map(target_of, Path("/proc/self/fd").iterdir()) if "stagemesh" in target]


def target_of(link):
    try:
        return str(link.readlink())
    except OSError:  # the listing's own
        return ""


def share_where_one_cannot(rank, size, port, reason):
    if rank == 1 and reason == "unreachable":
        shared_memory._map_theirs = lambda *_: (_ for _ in ()).throw(OSError("not allowed"))
    if reason == "machine":
        shared_memory.platform.machine = lambda: "aarch64"
    return share_memory(join_store(ADDRESS, port, 1, 20.0), 0, size, rank) is None


def measure(rank, size, port):
    store = join_store(ADDRESS, port, 1, 20.0)
    mapping = share_memory(store, 0, size, rank)
    gloo = TorchStage(GlooGroup("gloo", store, list(range(size)), rank, ADDRESS, 20.0))
    groups = [SharedMemoryStage(mapping, size, rank, 20.0), gloo]
    lines = []
    for nbytes in (4096, 65536, 1 << 20):
        tensor = torch.ones(nbytes // 4)
        medians = []
        for group in groups:
            times = []
            for _ in range(500):
                began = time.perf_counter()
                group.all_reduce(tensor)
                times.append(time.perf_counter() - began)
            medians.append(statistics.median(times) * 1e6)
        lines.append(f"{size} shards, {nbytes} bytes: {medians[0]:.0f} µs, gloo {medians[1]:.0f} µs")
    return lines


# Tests


def is_ok(answers):
    assert [kind for kind, _ in answers] == ["ok"] * len(answers), answers
    return [result for _, result in answers]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_right_and_have_the_same_bits_on_all_shards(run, size):
    by_shard = is_ok(run("sum_everything", size, size=size))
    expected = []
    for dtype in DTYPES:
        for shape in SHAPES:
            total = contribution(0, shape, dtype)
            to_float32 = total.float() if dtype.is_floating_point else total
            for shard in range(1, size):
                to_float32 = to_float32 + contribution(shard, shape, dtype)
            expected.append(to_float32.to(dtype))
    assert by_shard == [results_of(expected)] * size


def test_gathers_in_shard_order(run):
    by_shard = is_ok(run("gather_everything", 3, size=3))
    expected = [
        torch.stack([contribution(shard, shape, dtype) for shard in range(3)]) for dtype in DTYPES for shape in SHAPES
    ]
    assert by_shard == [results_of(expected)] * 3


@pytest.mark.parametrize(("size", "num_operations"), [(2, 3000), (4, 400), (8, 100)])
def test_many_operations_with_fewer_cores_than_shards(run, size, num_operations):
    is_ok(run("sum_often", size, size=size, num_operations=num_operations))


def test_timeout_names_the_operation_and_who_is_behind(run):
    first, second = is_ok(run("wait_for_nobody", 2, size=2))
    assert second is None
    assert first == "stage group: operation 2 timed out after 0.5 s, behind: shard 1 (at 1)"


def test_killed_neighbor_is_late(run):
    answers = run("lose_neighbor", 3, size=3)
    assert answers[1] == ("dead", 7)
    for kind, text in (answers[0], answers[2]):
        assert kind == "NeighborLate" and "behind: shard 1 (at 1)" in text


def test_abort_from_any_thread_frees_all_shards(run):
    waited_s = is_ok(run("abort_from_a_thread", 3, size=3))
    assert max(waited_s) < 30  # of the 60 that they would have waited


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("size", "all_reduce of 20 bytes torch.float32"),
        ("dtype", "all_reduce of 16 bytes torch.bfloat16"),
        ("operation", "all_gather of 16 bytes torch.float32"),
    ],
)
def test_different_operations_are_an_error_on_both_sides(run, kind, text):
    for outcome, error in run("disagree", 2, size=2, kind=kind):
        assert outcome == "RuntimeError"
        assert "operation 2 differs" in error and text in error and "all_reduce of 16 bytes torch.float32" in error


def test_other_threads_run_while_a_shard_waits(run):
    ticks = is_ok(run("wait_while_a_thread_works", 2, size=2))
    assert ticks[0] >= 10


def test_memory_has_no_name_and_goes_with_its_group(run):
    assert is_ok(run("look_at_names", 2, size=2)) == [([], False, [])] * 2


@pytest.mark.parametrize("reason", ["unreachable", "machine"])
def test_one_shard_without_shared_memory_is_all_without(run, reason):
    assert is_ok(run("share_where_one_cannot", 3, size=3, reason=reason)) == [True] * 3


@pytest.mark.soak
def test_is_faster_than_gloo(run):
    lines = is_ok(run("measure", 2, size=2))[0]
    print("\n".join(lines))
    assert len(lines) == 3
