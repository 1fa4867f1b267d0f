"""Fair shares: how many tokens each key has been served, and whose turn is next.

Sheng et al. 2024, "Fairness in Serving Large Language Models": the waiting key that was served least goes first. A key
that comes back after a pause starts level with those that wait, so nobody saves up turns.
"""

from collections.abc import Iterable


class FairShares:
    """Tokens by key: those of prompts that were computed, and those generated. One key alone is served in order."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._last = ""  # the key that had the last turn

    def served(self, key: str) -> int:
        """Tokens that count against a key; only their differences mean anything."""
        return self._served.get(key, 0)

    def charge(self, key: str, num_tokens: int) -> None:
        """Count tokens of a key; negative ones where fewer had to be computed than were counted."""
        self._served[key] = self.served(key) + num_tokens

    def arrive(self, key: str, waiting: Iterable[str]) -> None:
        """A key begins to wait, beside those that wait already."""
        floor = min(map(self.served, waiting), default=self.served(self._last))
        self._served[key] = max(self.served(key), floor)

    def take_turn(self, key: str, num_tokens: int) -> None:
        """A prompt of `num_tokens` of this key is going to be computed."""
        self._last = key
        self.charge(key, num_tokens)
