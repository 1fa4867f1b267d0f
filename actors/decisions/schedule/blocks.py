"""The pool of KV blocks: allocation, sharing of equal prefixes, and counts that must add up.

A block is in exactly one of three states: used (held by at least one sequence), cached (held by none, kept for its
contents), or free. The hash of a full block covers its ids and all before them (a chain of SHA-256): blocks of equal
hashes end equal prefixes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from actors.words.errors import IntegrityError

BlockHash = bytes


@dataclass(frozen=True)
class BlockCounts:
    """How many blocks are in each state: total = used + cached + free."""

    total: int
    used: int
    cached: int
    free: int


class BlockPool:
    """All blocks of one gang; the same numbers on every rank, since every rank runs the steps in the same order."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_blocks(self) -> int:
        """Blocks in all states."""
        return len(self._holders)

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones, which lose their contents."""
        return len(self._free) + len(self._cached)

    def counts(self) -> BlockCounts:
        """How many blocks are in each state now."""
        total, cached, free = len(self._holders), len(self._cached), len(self._free)
        return BlockCounts(total, total - cached - free, cached, free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one holder each; None, and none taken, when there are too few."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if not self._free:
                self._evict(next(iter(self._cached)))
            block = self._free.pop()
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Take one holder from each block; a block without holders stays cached if its hash is known.

        The blocks are in the order of the sequence, so that of a cached prefix the last block is given up first.
        """
        for block in reversed(list(blocks)):
            assert self._holders[block] > 0, f"block {block} released more often than held"
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def share(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Hold the blocks of the longest prefix of these hashes that is known: each gets one holder more."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            self._holders[block] += 1
            self._cached.pop(block, None)
            blocks.append(block)
        return blocks

    def add_hash(self, block: int, block_hash: BlockHash) -> None:
        """Record the hash of what a held block contains from the step just built on; `share` finds it from then on."""
        assert self._holders[block] > 0, f"block {block} gets a hash while nobody holds it"
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget_hash(self, block: int) -> None:
        """Forget the hash of a held block, if it has one: nobody else will share it."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]

    def check(self, tables: Iterable[list[int]]) -> None:
        """Compare the holders with the block tables of all live sequences. Raises IntegrityError with the numbers."""
        held = [0] * len(self._holders)
        for table in tables:
            for block in table:
                held[block] += 1
        wrong = [block for block, holders in enumerate(self._holders) if holders != held[block]]
        idle = set(self._free) | set(self._cached)
        counts = self.counts()
        if wrong or len(idle) != counts.free + counts.cached or any(held[block] for block in idle):
            raise IntegrityError(
                f"KV blocks do not add up: {counts}; held by sequences {sum(count > 0 for count in held)}; "
                f"blocks with a wrong count of holders: {wrong[:16]}"
            )

    def _evict(self, block: int) -> None:
        del self._cached[block]
        del self._block_of[self._hash_of.pop(block)]
        self._free.append(block)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def root_hash(*salts: str) -> BlockHash:
    """What a chain of hashes starts from. Requests with different salts never share blocks."""
    return hashlib.sha256(repr(salts).encode()).digest()


def next_hash(previous: BlockHash, ids: list[int]) -> BlockHash:
    """The hash of a full block of `ids` after the block whose hash is `previous`."""
    return hashlib.sha256(previous + b"".join(token.to_bytes(8, "little") for token in ids)).digest()
