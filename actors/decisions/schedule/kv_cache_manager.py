"""The KV blocks of each sequence: it reuses a cached prefix, takes more, caches full ones, gives all back."""

from actors.decisions.schedule.blocks import BlockPool, num_blocks_for
from actors.decisions.schedule.sequence import Sequence


class KVCacheManager:
    """Changes a sequence's block table and the pool together."""

    def __init__(self, pool: BlockPool, reuses_prefixes: bool) -> None:
        self.pool = pool
        self._reuses_prefixes = reuses_prefixes

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return num_blocks_for(num_tokens, self.pool.block_size)

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError for a sequence of prompt and generated tokens that the whole cache could not hold."""
        if (need := self.num_blocks(num_tokens)) > self.pool.num_blocks:
            raise ValueError(
                f"{num_tokens} tokens (prompt and max_tokens) need {need} KV blocks, the cache has "
                f"{self.pool.num_blocks}; shorten the prompt, lower max_tokens, or raise cache.num_blocks"
            )

    def reuse_prefix(self, sequence: Sequence) -> list[int]:
        """Take the blocks of the longest cached prefix → the ids they hold; at least one id is left to compute."""
        if self._reuses_prefixes and not sequence.blocks and not sequence.wants_prompt_logprobs:
            usable = (len(sequence.ids) - 1) // self.pool.block_size
            sequence.blocks = self.pool.share(sequence.full_hashes(self.pool.block_size)[:usable])
            sequence.num_scheduled = len(sequence.blocks) * self.pool.block_size
        return sequence.ids[: sequence.num_scheduled]

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take the blocks that the first `num_tokens` positions need; False, and none taken, when there are too few."""
        if num_tokens <= len(sequence.blocks) * self.pool.block_size:
            return True
        blocks = self.pool.allocate(self.num_blocks(num_tokens) - len(sequence.blocks))
        if blocks is None:
            return False
        sequence.blocks += blocks
        return True

    def cache_full_blocks(self, sequence: Sequence) -> None:
        """Tell the pool the hashes of the blocks that known ids fill: later entries may share these blocks."""
        if not self._reuses_prefixes:
            return
        num_full = min(sequence.num_scheduled, len(sequence.ids)) // self.pool.block_size
        if num_full == sequence.num_hashed:
            return
        hashes = sequence.full_hashes(self.pool.block_size)
        for index in range(sequence.num_hashed, num_full):
            self.pool.add_hash(sequence.blocks[index], hashes[index])
        sequence.num_hashed = num_full

    def never_share(self, sequence: Sequence) -> None:
        """Forget the hashes of its blocks: what they hold is wrong, and must not be shared."""
        for block in sequence.blocks:
            self.pool.forget_hash(block)

    def release(self, sequence: Sequence) -> None:
        """Give all its blocks back. Those with a hash stay cached until the pool needs them."""
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.num_scheduled, sequence.num_hashed = [], 0, 0
