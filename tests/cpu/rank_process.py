"""Ranks without Ray: processes that join groups, build a Runner and execute the steps that a test composes.

Run by path in one process, the mother, with `connections` and `rehearsal` among its globals. It imports everything,
rehearses once, and forks a rank for each connection: twelve ranks for one import. A rank answers each job with
("ok", result) or ("error", text), and leaves when its connection ends.
"""

import contextlib
import multiprocessing
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from actors.remote.imports import compiler_left_out

with compiler_left_out():  # as a rank on Ray does
    from actors.remote.rank import Rank as ServingRank
    from actors.tensors.backends.choose import import_backend, make_backend
    from actors.tensors.launched import Sampled
    from actors.tensors.runner import Runner

    import_backend("cpu", "cpu")

from actors.decisions.model.plan import Plan
from actors.remote.meeting import Assignment
from actors.tensors.sequence_table import StepTensors
from actors.words.messages import StepBatch, Substitution
from cluster.collectives import cpu_transport
from cluster.collectives.groups import Groups, join
from cluster.collectives.interface import LoneShard
from cluster.collectives.rendezvous import join_store

ADDRESS = "127.0.0.1"
CPU = torch.device("cpu")
PATIENCE_S = 60.0


class RecordingRunner(Runner):
    """Remembers the last step's output: logits on the last stage."""

    output: torch.Tensor

    def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
        self.output = super().forward(tensors, state)
        return self.output


class Rank:
    """The methods are the jobs."""

    groups: Groups | None = None
    runner: RecordingRunner
    serving: ServingRank

    def start(
        self, plan: Plan, rank: int, folder: Path, port: int, epoch: int, num_blocks: int, device: str, shares: bool
    ) -> int:
        """`device` as in a config; `shares`: whether the shards exchange through memory that they share, else gloo."""
        self.stop()
        store = join_store(ADDRESS, port, epoch, PATIENCE_S)
        with contextlib.ExitStack() as stack:
            if not shares:
                stack.enter_context(mock.patch.object(cpu_transport, "share_memory", lambda *_: None))
            self.groups = join(plan.topology, rank, store, CPU, ADDRESS, PATIENCE_S)
        backend = make_backend(device, CPU)
        backend.set_up()
        self.runner = RecordingRunner(plan, rank, self.groups, backend)
        report = self.runner.load(folder)
        self.runner.allocate_cache(num_blocks)
        self.runner.warm_up()
        return report.bytes_copied

    def rejoin(self, port: int, epoch: int) -> None:
        assert self.groups is not None
        self.groups.close()
        store = join_store(ADDRESS, port, epoch, PATIENCE_S)
        plan, rank = self.runner.plan, self.runner.shard.rank
        self.groups = join(plan.topology, rank, store, CPU, ADDRESS, PATIENCE_S)
        self.runner.join(self.groups)

    def substitutions(self) -> list[Substitution]:
        return self.runner.substitutions

    def execute(self, step: StepBatch) -> tuple[Sampled | None, Any]:
        sampled = self.runner.execute(step)
        return sampled, self.runner.output.float().numpy() if sampled and step.entries else None

    def hire(self, assignment: Assignment) -> bytes:
        self.stop()
        self.serving = ServingRank(assignment)
        return self.serving.new_key()

    def work(self, method: str, *args: Any) -> Any:
        return getattr(self.serving, method)(*args)

    def stop(self) -> None:
        if self.groups is not None:
            self.groups.close()
            self.groups = None


def serve(connection: Connection) -> None:
    rank = Rank()
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            break
        try:
            connection.send(("ok", getattr(rank, name)(*arguments)))
        except Exception:
            connection.send(("error", traceback.format_exc()))
    rank.stop()


class Alone:
    """The groups of a gang of one."""

    stage = LoneShard()
    previous = None
    next = None
    feedback = None


def be_mother(connections: list[Connection], rehearsal: tuple[Plan, Path]) -> None:
    torch.set_num_threads(1)
    plan, folder = rehearsal
    runner = Runner(plan, 0, Alone(), make_backend("cpu", CPU))  # imports what is imported lazily
    runner.load(folder)
    runner.allocate_cache(plan.num_blocks_for_longest)
    runner.warm_up()
    assert not {"torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys(), "a rank imports what it never uses"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=serve, args=(connection,)) for connection in connections]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


if "connections" in globals():
    be_mother(globals()["connections"], globals()["rehearsal"])
