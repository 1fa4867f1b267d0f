"""Symmetric memory: which message goes which way, what torch's kernels are asked, and that failing means NCCL."""

import logging
from types import SimpleNamespace

import pytest
import torch

from cluster.collectives import symmetric_memory
from cluster.collectives.symmetric_memory import BUFFER_BYTES, SymmetricStage, method_for, with_symmetric_memory

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

    def abort(self): ...

    def close(self): ...


@pytest.mark.parametrize(
    ("num_bytes", "num_shards", "has_multicast", "method"),
    [
        (16 * KIB, 2, False, "one_shot"),
        (16 * KIB, 8, True, "one_shot"),
        (256 * KIB, 8, True, "one_shot"),
        (256 * KIB + 16, 8, True, "multimem"),
        (256 * KIB + 16, 8, False, "nccl"),
        (512 * KIB, 4, False, "one_shot"),
        (513 * KIB, 4, False, "nccl"),
        (4 * KIB, 3, False, "one_shot"),
        (4 * KIB, 9, False, "nccl"),
        (4 * KIB, 16, True, "multimem"),
        (BUFFER_BYTES, 2, False, "one_shot"),
        (BUFFER_BYTES + 16, 2, True, "nccl"),
        (0, 2, True, "nccl"),
        (24, 2, True, "nccl"),
    ],
)
def test_a_message_goes_the_way_that_suits_it(num_bytes, num_shards, has_multicast, method):
    assert method_for(num_bytes, num_shards, has_multicast) == method


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


def test_sums_are_right_whatever_the_way(monkeypatch):
    fallback, kernels = Fallback(8), Kernels(8)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(symm_mem=kernels))
    stage = SymmetricStage(fallback, torch.zeros(BUFFER_BYTES, dtype=torch.uint8), "name", has_multicast=True)
    odd = torch.arange(65, dtype=torch.bfloat16)[1:]  # contiguous, and begins where no 16 bytes begin
    messages = [torch.arange(4096.0).view(8, 512), torch.ones(200_000), torch.arange(7), odd, torch.ones(3)]
    for message in messages:
        expected = message.clone() * 8
        assert torch.equal(stage.all_reduce(message), expected)
    assert kernels.calls == [("one_shot", "name"), ("multimem", "name")]
    assert fallback.reduced == 3
    assert stage.all_gather(torch.ones(2)).shape == (8, 2)


def test_kernels_are_asked_as_torch_declares_them():
    schemas = [
        str(getattr(torch.ops.symm_mem, name).default._schema).removeprefix(f"symm_mem::{name}")
        for name in ("one_shot_all_reduce_copy", "multimem_all_reduce_")
    ]
    assert schemas == [
        "(Tensor symm_buffer, Tensor local_input, str reduce_op, str group_name) -> Tensor",
        "(Tensor(a!) input, str reduce_op, str group_name) -> Tensor(a!)",
    ]


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
    kernels.one_shot_all_reduce_copy = lambda *arguments: reduce(*arguments) + is_right
    group = with_symmetric_memory(fallback, STORE, 0, CPU)
    assert isinstance(group, SymmetricStage) is is_right
    assert ("is wrong" in caplog.text) is not is_right
