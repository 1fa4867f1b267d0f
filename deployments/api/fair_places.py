"""Fair places: how many requests each key may have in a server that is full, so that none takes all places."""

import time
from collections.abc import Callable

ACTIVE_S = 10.0  # after its last request a key still counts


class FairPlaces:
    """Counts places by key. A key above its share leaves free what others may still want, but never more than half."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self.total = total
        self.num_taken = 0
        self._clock = clock
        self._held: dict[str, int] = {}
        self._seen: dict[str, float] = {}

    def num_lacking(self, key: str, count: int) -> int:
        """How many places have to come free before `count` more can be given to a key; 0: there is room."""
        self._seen[key] = self._clock()
        wanted = self.num_taken + count
        if self.is_above_share(key, count):
            wanted += self._reserved(key)
        return max(0, wanted - self.total)

    def is_above_share(self, key: str, count: int) -> bool:
        """Whether `count` more are above a key's share. Never for one that has none: it could not ask for less."""
        held = self._held.get(key, 0)
        return held > 0 and held + count > self.share()

    def take(self, key: str, count: int) -> None:
        """Give places to a key."""
        self.num_taken += count
        self._held[key] = self._held.get(key, 0) + count

    def give_back(self, key: str, count: int) -> None:
        """Take places back from a key."""
        self.num_taken -= count
        self._held[key] -= count
        self._seen[key] = self._clock()

    def share(self) -> float:
        """How many places each key may have that has asked for some lately."""
        self._forget()
        return self.total / len(self._seen)

    def _reserved(self, key: str) -> int:
        """What other keys lack to their shares, at most half of all places: they may not come at all."""
        share = self.share()
        lacking = sum(max(0.0, share - self._held.get(other, 0)) for other in self._seen if other != key)
        return min(self.total // 2, int(lacking))

    def _forget(self) -> None:
        """Forget keys that have left."""
        for key, seen in list(self._seen.items()):
            if seen < self._clock() - ACTIVE_S and not self._held.get(key):
                del self._seen[key]
                self._held.pop(key, None)
