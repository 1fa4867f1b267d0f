"""A transport whose stage group cannot be aborted: who waits for a lost shard stays in a kernel until it is ended.

So a rank behaves whose GPU spins in a kernel over symmetric memory. Here the rank's main thread does, in compiled code
that has let go of the interpreter, so that its heartbeats go on.
"""

from dataclasses import replace
from typing import Any

from actors.remote.actor_pool import RankActor
from cluster.collectives.cpu_transport import CPUTransport
from cluster.collectives.interface import StageGroup
from cluster.collectives.shared_memory import SharedMemoryStage, share_memory
from cluster.collectives.transport import Member

_FOREVER_S = 600.0


class StubbornStage(SharedMemoryStage):
    """Waits for as long as it takes, whatever is said."""

    can_abort = False

    def abort(self) -> None:
        """Nothing happens."""


class StubbornTransport(CPUTransport):
    def __init__(self, member: Member) -> None:
        super().__init__(replace(member, timeout_s=_FOREVER_S))

    def join_stage(self) -> StageGroup:
        member, topology = self._member, self._member.topology
        stage, shard, size = topology.stage(member.rank), topology.shard(member.rank), topology.tensor_parallel_size
        mapping = share_memory(member.store, stage, size, shard)
        assert mapping is not None, "no shared memory on this machine"
        return StubbornStage(mapping, size, shard, member.timeout_s)


class StubbornActor(RankActor):
    """What tests put in as `Gang.actor_class`: its rank exchanges over a StubbornTransport."""

    def assign(self, *arguments: Any) -> bytes:
        from cluster.collectives import groups

        groups._TRANSPORTS["cpu"] = StubbornTransport
        return super().assign(*arguments)
