"""The position-only cache: stands in for Transformers' cache, gives each token's position, and stores nothing.

Our own attention stores keys and values. Models that need more from a cache (states of recurrent layers) call methods
that it does not have, by which the probe finds them.
"""

from typing import Any

import torch

# Attributes that models read from a cache, and that may be missing.
_HARMLESS = frozenset({"is_compileable", "is_sliding", "is_linear", "is_dummy"})


class PositionOnlyCache:
    """The cache of packed tokens.

    Models that count positions themselves add the cache's length to 0, 1, 2 ...; the tokens of a step belong to many
    sequences, so the length here is a number for each token, such that the sum is its position.
    """

    def __init__(self, positions_T: torch.Tensor) -> None:
        count_T = torch.arange(positions_T.shape[0], dtype=positions_T.dtype, device=positions_T.device)
        self._length_T = positions_T - count_T

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """Position minus index of each token, int64 [T]."""
        return self._length_T

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return them as they are: attention itself writes them into the paged cache."""
        return key_states, value_states


class ProbedCache:
    """An empty cache that notes which further attributes a model reads from it."""

    def __init__(self) -> None:
        self.wanted: set[str] = set()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the cache is empty."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the first query, for mask functions."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of keys and the position of the first, for mask functions."""
        return query_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See PositionOnlyCache."""
        return key_states, value_states

    def __getattr__(self, name: str) -> Any:
        """Note the name of any other attribute."""
        if name not in _HARMLESS and not name.startswith("__"):
            self.wanted.add(name)
        raise AttributeError(name)
