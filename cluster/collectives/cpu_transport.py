"""The transport of CPU tensors: a stage over shared memory, else over gloo; links over sockets."""

from cluster.collectives.interface import StageGroup
from cluster.collectives.process_group import GlooGroup, TorchStage
from cluster.collectives.shared_memory import SharedMemoryStage, share_memory
from cluster.collectives.socket_link import SocketLink, connect_links
from cluster.collectives.transport import Member


class CPUTransport:
    """Connects ranks whose tensors are on the CPU; see Transport."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def join_stage(self) -> StageGroup:
        """See Transport."""
        member, topology = self._member, self._member.topology
        stage, shard, size = topology.stage(member.rank), topology.shard(member.rank), topology.tensor_parallel_size
        mapping = share_memory(member.store, stage, size, shard)
        if mapping is not None:
            return SharedMemoryStage(mapping, size, shard, member.timeout_s)
        ranks = topology.stage_ranks(stage)
        return TorchStage(
            GlooGroup(f"stage{stage}", member.store, ranks, member.rank, member.address, member.timeout_s)
        )

    def connect(self, name: str, before: int | None, after: int | None) -> tuple[SocketLink | None, SocketLink | None]:
        """See Transport."""
        member = self._member
        return connect_links(member.store, member.rank, before, after, member.address, member.timeout_s, name)
