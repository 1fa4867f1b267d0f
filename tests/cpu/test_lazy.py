"""Lazy tensors: whatever conversions make of them, any part that is read equals that part of what torch makes."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
)

from actors.decisions.model.shard_plan import ShardPlan, TensorSlice
from actors.tensors.weights.checkpoint import Sources, boxes, load_weights
from actors.tensors.weights.conversion import Computed, ConversionGroup, Conversions
from actors.tensors.weights.lazy import Lazy, Leaf, NotLazyError
from actors.tensors.weights.mapped import byte_range, copied
from actors.tensors.weights.safetensors_index import read_header


def saved(tensors: list[torch.Tensor], folder: Path) -> list[Leaf]:
    save_file({f"{number:03}": tensor for number, tensor in enumerate(tensors)}, folder / "a.safetensors")
    header = read_header(folder / "a.safetensors")
    return [Leaf(header[f"{number:03}"]) for number in range(len(tensors))]


def read(lazy: Lazy, intervals: Any) -> torch.Tensor:
    target = torch.full([sum(end - first for first, end in dim) for dim in intervals], float("nan"))
    reads = [one for box, place in boxes(intervals) for one in lazy.reads(box, target[place])]
    assert sum(copied(reads)) == target.nbytes, "an element is read twice, or never"
    for one in reads:
        first, end = byte_range(one)
        assert one.stored.offset <= first < end <= one.stored.offset + 4 * torch.Size(one.stored.shape).numel()
    return target


def part(whole: torch.Tensor, intervals: Any) -> torch.Tensor:
    for dim, of_dim in enumerate(intervals):
        whole = torch.cat([whole.narrow(dim, first, end - first) for first, end in of_dim], dim)
    return whole


def random_intervals(chance: random.Random, shape: tuple[int, ...]) -> Any:
    """One to three runs a dimension, in order."""
    intervals = []
    for size in shape:
        cuts = sorted(chance.sample(range(size + 1), min(2 * chance.randint(1, 3), (size + 1) // 2 * 2)))
        intervals.append(tuple(zip(cuts[::2], cuts[1::2], strict=True)))
    return tuple(intervals)


def grown(chance: random.Random, real: list[torch.Tensor], lazy: list[Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """One more operation on tensors of equal shape."""
    dim = chance.randrange(real[0].ndim)
    match chance.choice(("stack", "cat", "chunk", "split", "transpose")):
        case "stack" if real[0].ndim < 4:
            return [torch.stack(real, dim)], [torch.stack(lazy, dim)]
        case "cat":
            return [torch.cat(real, dim)], [torch.cat(lazy, dim)]
        case "chunk" if real[0].shape[dim] % 2 == 0:
            return list(torch.chunk(real[0], 2, dim)), list(torch.chunk(lazy[0], 2, dim))
        case "split" if real[0].shape[dim] > 2:
            sizes = [1, real[0].shape[dim] - 1]
            return [torch.split(real[0], sizes, dim)[1]], [torch.split(lazy[0], sizes, dim)[1]]
        case _:
            other = chance.randrange(real[0].ndim)
            return [one.transpose(dim, other) for one in real], [torch.transpose(one, dim, other) for one in lazy]


@pytest.mark.parametrize("seed", range(60))
def test_chains_of_operations_are_followed_backwards(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    shape = [chance.randint(2, 6) for _ in range(chance.randint(1, 3))]
    real = [torch.randn(shape) for _ in range(chance.randint(1, 4))]
    lazy: list[Any] = list(saved(real, tmp_path))
    for _ in range(chance.randint(1, 5)):
        real, lazy = grown(chance, real, lazy)
    for whole, source in zip(real, lazy, strict=True):
        assert tuple(source.shape) == tuple(whole.shape)
        assert source.ndim == whole.ndim
        for _ in range(4):
            intervals = random_intervals(chance, tuple(whole.shape))
            assert torch.equal(read(source.contiguous(), intervals), part(whole, intervals))


class Model:
    """What Split asks for."""

    config = None

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty({"q": 8, "k": 4, "v": 4}[name], 6)


@pytest.mark.parametrize(
    ("operations", "sources", "targets", "shapes"),
    [
        ([MergeModulelist(0), Concatenate(1)], ["w1", "w3"], ["gate_up"], {"w1": [(6, 4)] * 8, "w3": [(6, 4)] * 8}),
        ([MergeModulelist(0), Transpose(1, 2)], ["w"], ["down"], {"w": [(6, 4)] * 4}),
        ([Chunk(0)], ["qkv"], ["q", "k", "v"], {"qkv": [(24, 4)]}),
        ([Split(0)], ["qkv"], ["q", "k", "v"], {"qkv": [(16, 6)]}),
        ([Concatenate(0)], ["q", "k"], ["qk"], {"q": [(8, 4)], "k": [(2, 4)]}),
        ([Transpose(0, 1)], ["w"], ["w_t"], {"w": [(6, 4)]}),
    ],
)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_transformers_conversions_cut_after_they_convert(
    operations: Any, sources: list[str], targets: list[str], shapes: Any, tp: int, tmp_path: Path
) -> None:
    """The truth is the cut of the whole: cutting the sources first is another tensor where they are taken apart."""
    real = {name: [torch.randn(shape) for shape in of_name] for name, of_name in shapes.items()}
    leaves = iter(saved([tensor for of_name in real.values() for tensor in of_name], tmp_path))
    lazy: Any = {name: list(itertools.islice(leaves, len(of_name))) for name, of_name in real.items()}
    whole: Any = dict(real)
    for operation in operations:
        more = {"source_patterns": sources, "target_patterns": targets, "model": Model(), "config": None}
        whole = operation.convert(whole, **more, full_layer_name=targets[0])
        lazy = operation.convert(lazy, **more, full_layer_name=targets[0])
    for name in targets:
        for dim, shard in itertools.product(range(whole[name].ndim), range(tp)):
            size = whole[name].shape[dim]
            intervals = [((0, other),) for other in whole[name].shape]
            intervals[dim] = ((shard * size // tp, (shard + 1) * size // tp),)
            if intervals[dim][0][0] < intervals[dim][0][1]:
                assert torch.equal(read(lazy[name], tuple(intervals)), part(whole[name], intervals))


def test_what_is_not_understood_backwards_says_so(tmp_path: Path) -> None:
    [leaf] = saved([torch.randn(4, 6)], tmp_path)
    with pytest.raises(NotLazyError):
        Interleave(0).convert({"a": [leaf]}, ["a"], ["b"])
    with pytest.raises(NotLazyError):
        torch.flip(leaf, [0])  # type: ignore[arg-type]
    with pytest.raises(NotLazyError):
        leaf[1:]
    with pytest.raises(ValueError, match="cannot be stacked"):
        torch.stack([leaf, leaf.transpose(0, 1)])  # type: ignore[list-item]


def test_what_is_not_understood_backwards_is_converted_whole(tmp_path: Path) -> None:
    stored = [leaf.stored for leaf in saved([torch.arange(48.0).view(8, 6)], tmp_path)]
    conversions = Conversions.__new__(Conversions)
    conversions.structure = Model()  # type: ignore[assignment]
    group = ConversionGroup("b.weight", WeightConverter("a", "b", operations=[Interleave(0)]), {"a": stored})
    sources = conversions.sources({"b.weight": group}, {"b.weight"})
    assert isinstance(sources["b.weight"], Computed)
    tensor = TensorSlice("b.weight", "b.weight", (8, 6), (((2, 5),), ((1, 2), (4, 6))), "float32")
    shard = ShardPlan(0, 0, 0, (0, 1), (), (0, 0), True, True, False, (tensor,))
    target = torch.zeros(3, 3)
    report = load_weights(Sources(shard, sources, conversions, None), {"b.weight": target})
    whole = Interleave(0).convert({"a": [torch.arange(48.0).view(8, 6)]}, ["a"], ["b"])["b"]
    assert torch.equal(target, part(whole, tensor.intervals))
    assert (report.computed, report.bytes_copied) == (("b.weight",), 36)
