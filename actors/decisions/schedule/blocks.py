"""Which sequence holds which KV block: allocation, sharing of equal prefixes, and an account that must add up.

A block is in exactly one of three states: used (held by at least one sequence), cached (held by nobody, kept for its
contents), or free. Blocks are named by a SHA-256 chain over their contents: an equal name means an equal prefix.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from actors.words.errors import IntegrityError

BlockHash = bytes


@dataclass(frozen=True)
class BlockCounts:
    """The account: total = used + cached + free."""

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
        """All blocks."""
        return len(self._holders)

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones, and cached ones that would be given up."""
        return len(self._free) + len(self._cached)

    def counts(self) -> BlockCounts:
        """The account as it stands."""
        total, cached, free = len(self._holders), len(self._cached), len(self._free)
        return BlockCounts(total, total - cached - free, cached, free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each, or None when there are too few; nothing is taken then."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if not self._free:
                self._forget(next(iter(self._cached)))
            block = self._free.pop()
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer for each; a block without holders is kept for its contents if they are named.

        Give them in the order of the sequence: of one prefix the last block is given up first.
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
        """The blocks of the longest known prefix of a chain, each with one holder more."""
        blocks = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            self._holders[block] += 1
            self._cached.pop(block, None)
            blocks.append(block)
        return blocks

    def name(self, block: int, name: BlockHash) -> None:
        """Say that a held block's contents are, from the step just built on, those that the name stands for."""
        assert self._holders[block] > 0, f"block {block} named while nobody holds it"
        if name not in self._block_of and block not in self._hash_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def forget(self, block: int) -> None:
        """Say that a held block's contents are worth nothing to others."""
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._block_of[name]

    def check(self, tables: Iterable[list[int]]) -> None:
        """Compare the account with the tables of all live sequences. Raises IntegrityError with the numbers."""
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

    def _forget(self, block: int) -> None:
        del self._cached[block]
        del self._block_of[self._hash_of.pop(block)]
        self._free.append(block)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def root_hash(salt: str) -> BlockHash:
    """The start of a chain. Requests with different salts (adapter, API key) never share blocks."""
    return hashlib.sha256(salt.encode()).digest()


def next_hash(previous: BlockHash, ids: list[int]) -> BlockHash:
    """The name of a full block of `ids` that follows the prefix named `previous`."""
    return hashlib.sha256(previous + b"".join(token.to_bytes(8, "little") for token in ids)).digest()
