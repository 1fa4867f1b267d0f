"""Symmetric memory: which message goes which way, what torch's kernels are asked, and that failing means NCCL."""

import logging
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from cluster.collectives import symmetric_memory
from cluster.collectives.methods import BUFFER_BYTES, StageLinks, all_reduce_s, method_for
from cluster.collectives.symmetric_memory import SymmetricStage, with_symmetric_memory

KIB = 1024
CPU = torch.device("cpu")


class Fallback:
    """Stands for NCCL over `size` shards that all hold the same."""

    shard = 0

    def __init__(self, size=2):
        self.size, self.reduced = size, 0

    def all_reduce(self, tensor):
        self.reduced += 1
        return tensor.mul_(self.size)

    def all_gather(self, tensor):
        return torch.stack([tensor] * self.size)

    can_abort = True

    def abort(self): ...

    def close(self): ...


NVLINK, SWITCH, NONE = (True, False), (True, True), (False, False)


@pytest.mark.parametrize(
    ("num_bytes", "num_shards", "links", "method"),
    [
        (16 * KIB, 2, NVLINK, "one_shot"),
        (16 * KIB, 8, SWITCH, "one_shot"),
        (16 * KIB, 8, NONE, "nccl"),
        (256 * KIB, 8, SWITCH, "one_shot"),
        (256 * KIB + 16, 8, SWITCH, "multimem"),
        (256 * KIB + 16, 8, NVLINK, "two_shot"),
        (1024 * KIB, 4, SWITCH, "one_shot"),
        (1025 * KIB, 4, NVLINK, "two_shot"),
        (512 * KIB, 6, NVLINK, "one_shot"),
        (513 * KIB, 6, SWITCH, "multimem"),
        (4 * KIB, 3, NVLINK, "one_shot"),
        (BUFFER_BYTES, 2, NVLINK, "one_shot"),
        (BUFFER_BYTES + 16, 2, SWITCH, "nccl"),
        (0, 2, SWITCH, "nccl"),
        (24, 2, SWITCH, "nccl"),
    ],
)
def test_a_message_goes_the_way_that_suits_it(num_bytes, num_shards, links, method):
    assert method_for(num_bytes, StageLinks(num_shards, *links)) == method


def test_what_an_all_reduce_takes_is_near_what_was_measured():
    """µs on H100s of hidden states in bfloat16: 4 shards in one shot, 6 in the switch and through NCCL."""
    measured = [(4, SWITCH, 512, 10), (4, SWITCH, 1024, 15), (6, SWITCH, 1024, 16), (6, SWITCH, 2048, 21)]
    measured += [(6, NONE, 1024, 25), (4, NONE, 1024, 21), (4, NONE, 2048, 27)]
    for num_shards, links, num_kib, us in measured:
        found = all_reduce_s(num_kib * KIB, StageLinks(num_shards, *links), 450e9) * 1e6
        assert found == pytest.approx(us, rel=0.25), (num_shards, links, num_kib)


class Kernels:
    """torch.ops.symm_mem, as its schemas have it, for shards that all hold the same."""

    def __init__(self, size):
        self.size, self.calls = size, []

    def one_shot_all_reduce_copy(self, symm_buffer, local_input, reduce_op, group_name):
        assert (symm_buffer.shape, symm_buffer.dtype, reduce_op) == (local_input.shape, local_input.dtype, "sum")
        self.calls.append(("one_shot", group_name))
        symm_buffer.copy_(local_input)
        return symm_buffer * self.size

    def multimem_all_reduce_(self, input, reduce_op, group_name):  # noqa: A002
        self.calls.append(("multimem", group_name))
        return input.mul_(self.size)

    def two_shot_all_reduce_(self, input, reduce_op, group_name):  # noqa: A002
        self.calls.append(("two_shot", group_name))
        return input.mul_(self.size)


@pytest.mark.parametrize(("has_multicast", "large"), [(True, "multimem"), (False, "two_shot")])
def test_sums_are_right_whatever_the_way(monkeypatch, has_multicast, large):
    fallback, kernels = Fallback(8), Kernels(8)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(symm_mem=kernels))
    stage = SymmetricStage(fallback, torch.zeros(BUFFER_BYTES, dtype=torch.uint8), "name", has_multicast)
    odd = torch.arange(65, dtype=torch.bfloat16)[1:]  # contiguous, and begins where no 16 bytes begin
    messages = [torch.arange(4096.0).view(8, 512), torch.ones(200_000), torch.arange(7), odd, torch.ones(3)]
    for message in messages:
        expected = message.clone() * 8
        assert torch.equal(stage.all_reduce(message), expected)
    assert kernels.calls == [("one_shot", "name"), (large, "name")]
    assert fallback.reduced == 3
    assert stage.all_gather(torch.ones(2)).shape == (8, 2)


def test_kernels_are_asked_as_torch_declares_them():
    schemas = [
        str(getattr(torch.ops.symm_mem, name).default._schema).removeprefix(f"symm_mem::{name}")
        for name in ("one_shot_all_reduce_copy", "multimem_all_reduce_", "two_shot_all_reduce_")
    ]
    assert schemas == [
        "(Tensor symm_buffer, Tensor local_input, str reduce_op, str group_name) -> Tensor",
        *["(Tensor(a!) input, str reduce_op, str group_name) -> Tensor(a!)"] * 2,
    ]


class SlowKernels:
    """torch.ops.symm_mem for one thread a shard, with its barriers: a shard's buffer is read while others go on.

    Each kernel ends, as torch's do, with a barrier over all shards; `closes=False` leaves it out.
    """

    def __init__(self, size, closes=True):
        self.size, self.closes = size, closes
        self.buffers = [torch.zeros(BUFFER_BYTES, dtype=torch.uint8) for _ in range(size)]
        self.barrier = threading.Barrier(size)
        self.random = random.Random(3)

    def _nap(self):
        time.sleep(self.random.choice((0, 0, 0.002)))

    def _sum(self, shared):
        total = torch.zeros_like(shared)
        for buffer in self.buffers:
            self._nap()
            total += buffer.view(shared.dtype)[: shared.numel()].view(shared.shape)
        return total

    def _end(self):
        if self.closes:
            self.barrier.wait(20)

    def one_shot_all_reduce_copy(self, symm_buffer, local_input, reduce_op, group_name):
        symm_buffer.copy_(local_input)
        self.barrier.wait(20)
        total = self._sum(symm_buffer)
        self._end()
        return total

    def two_shot_all_reduce_(self, input, reduce_op, group_name):  # noqa: A002
        self.barrier.wait(20)
        total = self._sum(input)
        self.barrier.wait(20)  # here each shard writes the part that it has summed into all buffers; then the last one
        input.copy_(total)
        self._end()
        return input


@pytest.mark.parametrize("closes", [True, False])
def test_a_slow_shard_still_reads_what_a_fast_one_would_overwrite(monkeypatch, closes):
    """One buffer, consecutive messages of any size and method: the closing barrier is what makes that right."""
    size, kernels, wrong = 3, SlowKernels(3, closes), []
    monkeypatch.setattr(torch, "ops", SimpleNamespace(symm_mem=kernels))
    counts = [64, 400_000, 8, 8, 300_000, 64] * 5

    def run(shard):
        stage = SymmetricStage(Fallback(size), kernels.buffers[shard], "name", has_multicast=False)
        for number, count in enumerate(counts):
            mine, expected = float(number * size + shard), sum(number * size + other for other in range(size))
            if not torch.equal(stage.all_reduce(torch.full((count,), mine)), torch.full((count,), float(expected))):
                wrong.append((shard, number))

    threads = [threading.Thread(target=run, args=(shard,)) for shard in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (not wrong) is closes


STORE = SimpleNamespace(epoch=1, part=lambda name: None)


def test_where_it_cannot_be_had_nccl_does_everything(caplog):
    caplog.set_level(logging.INFO)
    for size in (2, 9):
        fallback = Fallback(size)
        assert with_symmetric_memory(fallback, STORE, 0, CPU) is fallback
    assert "all-reduces go through NCCL, not through symmetric memory" in caplog.text
    assert "is for 2 to 8 shards, not 9" in caplog.text


@pytest.mark.parametrize("is_right", [True, False])
def test_sums_are_tried_before_they_are_trusted(monkeypatch, caplog, is_right):
    fallback, kernels = Fallback(2), Kernels(2)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(symm_mem=kernels))
    monkeypatch.setattr(symmetric_memory, "_allocate", lambda device: torch.zeros(BUFFER_BYTES, dtype=torch.uint8))
    monkeypatch.setattr(symmetric_memory, "_meet", lambda *_: SimpleNamespace(multicast_ptr=0))
    # Shards that hold the same are no stage; what the check expects of shards 0 and 1 is this
    reduce = kernels.one_shot_all_reduce_copy
    num_sums = []
    kernels.one_shot_all_reduce_copy = lambda *arguments: num_sums.append(1) or reduce(*arguments) + is_right
    group = with_symmetric_memory(fallback, STORE, 0, CPU)
    assert isinstance(group, SymmetricStage) is is_right
    assert group.can_abort is not is_right
    assert ("is wrong" in caplog.text) is not is_right
    assert len(num_sums) > 2, "the other shards wait for every sum"
