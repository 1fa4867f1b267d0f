"""How fast ranks exchange and hand on, measured over the groups by which they will serve."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cluster.collectives.groups import Groups, join
from cluster.collectives.interface import Link, StageGroup
from cluster.collectives.rendezvous import join_store
from cluster.topology import Topology

SMALL_BYTES = 8192  # a decode step's message
_LARGE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # below 1 GiB an H100 does not reach what its links can
_PAIR_BYTES = 256 << 20
_TRIAL_SHARE = 64  # of a large message: by so much less is tried before hops are measured
_HOPS_S = 12.0  # for all of them, on a network of any speed
_WARM_UP, _SMALL_ROUNDS, _LARGE_ROUNDS = 5, 100, 5


@dataclass(frozen=True)
class Rates:
    """What one rank has measured; None where it has no such neighbor."""

    exchange_s: float | None  # an all-reduce of SMALL_BYTES in its stage
    exchange_bytes_per_s: float | None  # bus bandwidth of large ones; see exchange_rate
    hop_bytes_per_s: float | None  # large messages from the stage before
    trip_s: float | None  # first stage only: SMALL_BYTES once through all stages and back


def measure(
    topology: Topology, rank: int, meeting: tuple[str, int], device: str, address: str, timeout_s: float
) -> Rates:
    """Join all other ranks at the store `meeting`, measure together with them, and leave. Every rank calls it once.

    `address` is this node's own. Raises TimeoutError, which names who is missing, or RuntimeError.
    """
    where = torch.device(device)
    groups = join(topology, rank, join_store(*meeting, epoch=0, timeout_s=timeout_s), where, address, timeout_s)
    try:
        stage, message = groups.stage, _small(where)
        has_others = stage.size > 1
        return Rates(
            _time(lambda: stage.all_reduce(message), where, _SMALL_ROUNDS) if has_others else None,
            exchange_rate(stage, where) if has_others else None,
            _hops(topology, rank, groups, where),
            _trip(topology, rank, groups, where),
        )
    finally:
        groups.abort()
        groups.close()


def exchange_rate(stage: StageGroup, device: torch.device) -> float:
    """Bus bandwidth of large all-reduces in bytes a second: bytes / time × 2 (n - 1) / n, as nccl-tests has it.

    All shards of a stage call it together.
    """
    message = torch.zeros(_LARGE_BYTES[device.type] // 4, device=device)
    seconds = _time(lambda: stage.all_reduce(message), device, _LARGE_ROUNDS)
    return message.nbytes / seconds * 2 * (stage.size - 1) / stage.size


def pair_rate(source: int, target: int) -> float:
    """Bytes a second of copies from one GPU of this node to another. Both must be reserved for the caller."""
    sent = torch.zeros(_PAIR_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
    received = torch.empty_like(sent, device=f"cuda:{target}")
    return _PAIR_BYTES / _time(lambda: received.copy_(sent), sent.device, _LARGE_ROUNDS)


def _time(work: Callable[[], object], device: torch.device, rounds: int, warm_up: int = _WARM_UP) -> float:
    """Seconds of one call, after a few that do not count."""
    for _ in range(warm_up):
        work()
    _settle(device)
    began = time.perf_counter()
    for _ in range(rounds):
        work()
    _settle(device)
    return (time.perf_counter() - began) / rounds


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds_within(budget_s: float, trial_s: float) -> tuple[bool, int]:
    """(Whether large messages are sent, how often) so that as many again, to warm up, end in time too.

    `trial_s` is what a message of 1 / _TRIAL_SHARE took. On a slow network the rate of small ones must do.
    """
    at_most = budget_s / 2 / max(trial_s, 1e-9)
    is_large = at_most >= _TRIAL_SHARE
    return is_large, min(_LARGE_ROUNDS, max(1, int(at_most / _TRIAL_SHARE if is_large else at_most)))


def _hops(topology: Topology, rank: int, groups: Groups, device: torch.device) -> float | None:
    """One boundary between stages after the other, so that they do not share a network card → the rate to this rank."""
    large, own, rate = torch.zeros(_LARGE_BYTES[device.type] // 8, device=device), topology.stage(rank), None
    small = large[: len(large) // _TRIAL_SHARE]
    for stage in range(1, topology.pipeline_parallel_size):
        work: Callable[[torch.Tensor], object] | None = None
        if own == stage - 1 and groups.next is not None:
            work = partial(_send, groups.next)
        elif own == stage and groups.previous is not None:
            work = groups.previous.receive
        groups.control.barrier()
        took_s = torch.zeros(1)
        if work is not None:
            seconds = _time(partial(work, small), device, 1, 1)
            took_s += seconds if own == stage else 0.0
        groups.control.all_reduce(took_s)  # all shards of the two stages come to the same number
        trial_s = took_s.item() / topology.tensor_parallel_size
        is_large, rounds = rounds_within(_HOPS_S / (topology.pipeline_parallel_size - 1), trial_s)
        message = large if is_large else small
        if work is not None:
            seconds = _time(partial(work, message), device, rounds, rounds)
            rate = message.nbytes / seconds if own == stage else rate
    return rate


def _trip(topology: Topology, rank: int, groups: Groups, device: torch.device) -> float | None:
    if groups.feedback is None and (groups.previous is None or groups.next is None):
        return None  # a single stage
    message, feedback, previous, following = _small(device), groups.feedback, groups.previous, groups.next

    def first() -> None:
        assert following is not None and feedback is not None
        following.send(message).wait()
        feedback.receive(message)
        _settle(device)

    def other() -> None:
        onward = following or feedback
        assert previous is not None and onward is not None
        previous.receive(message)
        onward.send(message).wait()

    groups.control.barrier()
    is_first = topology.is_first_stage(rank)
    seconds = _time(first if is_first else other, device, _SMALL_ROUNDS)
    return seconds if is_first else None


def _send(link: Link, message: torch.Tensor) -> None:
    link.send(message).wait()


def _small(device: torch.device) -> torch.Tensor:
    return torch.zeros(SMALL_BYTES // 4, device=device)
