"""A backend that lives in a folder of its own serves a model as the CPU's does; one that cannot be had is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from actors.decisions.model.plan import DEFAULT_BLOCK_SIZE
from actors.tensors.backends.choose import backend_class, default_block_size, make_backend, placed_on
from actors.tensors.backends.cpu.backend import CPUBackend
from actors.tensors.backends.cuda.backend import CUDABackend
from actors.words.messages import Entry, NewSequence, SamplingParams, StepBatch, Substitution
from configs.config import Config

COUNTING = "tests.counting_backend.backend:CountingBackend"


def step(number: int, entries: list[Entry], opened: tuple[NewSequence, ...] = ()) -> StepBatch:
    return StepBatch(1, number, 0, list(opened), [], entries)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout", [(1, 1), (2, 2)])
def test_it_brings_the_cpu_s_ids(
    layout: tuple[int, int], gang_on: Callable[..., Any], plan_of: Callable[..., Any]
) -> None:
    plan = plan_of("llama", *layout, cache={"block_size": 8})
    sampling = [SamplingParams(temperature=0), SamplingParams(1.0, 7, top_p=0.9), SamplingParams(0.8, 3)]
    prompts = [[5, 6, 7], list(range(10, 23)), [40]]
    tokens: dict[str, list[list[list[int]]]] = {}
    for device in ("cpu", COUNTING):
        gang = gang_on(plan, "llama", device)
        opened = tuple(NewSequence(seq, one, [], len(prompts[seq])) for seq, one in enumerate(sampling))
        entries = [Entry(seq, 0, ids, list(range(4 * seq, 4 * seq + 4)), True) for seq, ids in enumerate(prompts)]
        tokens[device] = [gang.execute(step(0, entries, opened))[0].token_ids]
        for i in range(12):
            last = tokens[device][-1]
            rows = [Entry(seq, len(prompts[seq]) + i, last[seq], [], True) for seq in range(3)]
            tokens[device].append(gang.execute(step(1 + i, rows))[0].token_ids)
        substitutions = gang.pool.ask([("substitutions", ())] * plan.topology.num_ranks)
        if device == COUNTING:
            expected = [[Substitution("counted", len(shard.attentions))] for shard in plan.shards]
            assert substitutions == expected
    assert tokens["cpu"] == tokens[COUNTING]


def test_its_calls_are_counted() -> None:
    backend = make_backend(COUNTING, torch.device("cpu"))
    method = backend.linear_method([torch.ones(2, 3)])
    assert method is not None
    method.multiply(torch.ones(1, 3), None)
    backend.best_tokens(torch.ones(1, 4), 0, None, None)
    assert backend.counts == {"multiply": 1, "best_tokens": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("no.such.package:Backend", "no.such.package:Backend cannot be imported here .*ModuleNotFoundError"),
        ("configs.config:Nothing", "cannot be imported here .*AttributeError"),
        ("configs.config:Config", "is no backend: it has no placed_on, default_block_size, set_up"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(device: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"device: .*{reason}"):
        backend_class(Config.model_validate({"model": {"source": "x"}, "device": device}).device)


def test_defaults_are_the_device_s_own() -> None:
    assert default_block_size("cpu", "cpu") == CPUBackend.default_block_size == DEFAULT_BLOCK_SIZE
    assert default_block_size("auto", "cuda") == CUDABackend.default_block_size == DEFAULT_BLOCK_SIZE
    assert default_block_size(COUNTING, "cpu") == 8
    assert [placed_on(device) for device in ("auto", "cuda", COUNTING)] == ["auto", "cuda", "cpu"]


def test_the_contract_is_whole() -> None:
    """Every shipped backend has what the contract names."""
    from actors.tensors.backend import Backend

    names = {name for name in (*vars(Backend), *Backend.__annotations__) if not name.startswith("_")}
    for device in ("cpu", "cuda", COUNTING):
        assert names <= set(dir(make_backend(device, torch.device("cpu" if device != "cuda" else "cuda"))))
