"""The grid of ranks: the stage and the shard of each rank, and its neighbors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """`tensor_parallel_size` shards × `pipeline_parallel_size` stages; rank = stage × tensor_parallel_size + shard."""

    tensor_parallel_size: int
    pipeline_parallel_size: int

    @property
    def num_ranks(self) -> int:
        """Ranks of one gang."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def answering_rank(self) -> int:
        """The rank that sends results: shard 0 of the last stage."""
        return self.rank(self.pipeline_parallel_size - 1, 0)

    def rank(self, stage: int, shard: int) -> int:
        """The rank at (stage, shard)."""
        return stage * self.tensor_parallel_size + shard

    def stage(self, rank: int) -> int:
        """The stage of a rank."""
        return rank // self.tensor_parallel_size

    def shard(self, rank: int) -> int:
        """The shard of a rank."""
        return rank % self.tensor_parallel_size

    def stage_ranks(self, stage: int) -> list[int]:
        """The ranks of one tensor-parallel group, in shard order."""
        return [self.rank(stage, shard) for shard in range(self.tensor_parallel_size)]

    def is_first_stage(self, rank: int) -> bool:
        """Whether the rank embeds ids."""
        return self.stage(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        """Whether the rank computes logits."""
        return self.stage(rank) == self.pipeline_parallel_size - 1

    def next_rank(self, rank: int) -> int:
        """The rank that receives this rank's hidden states: the same shard of the next stage."""
        return rank + self.tensor_parallel_size

    def previous_rank(self, rank: int) -> int:
        """The rank that sends hidden states to this rank: the same shard of the stage before."""
        return rank - self.tensor_parallel_size
