"""Stands where models expect Transformers' cache: says how far each token is, and keeps nothing.

Keys and values are kept by our own attention. Models that keep more (states of recurrent layers) ask for more than is
here, and are found out.
"""

from typing import Any

import torch

# What may be asked of a cache without a consequence when it is not there.
_HARMLESS = frozenset({"is_compileable", "is_sliding", "is_linear", "is_dummy"})


class PositionOnlyCache:
    """The past of packed tokens.

    Models that count positions themselves add the cache's length to 0, 1, 2 ...; the tokens of a step belong to many
    sequences, so the length here is a number for each token, such that the sum is its position.
    """

    def __init__(self, positions_T: torch.Tensor) -> None:
        count_T = torch.arange(positions_T.shape[0], dtype=positions_T.dtype, device=positions_T.device)
        self._length_T = positions_T - count_T

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """Int64 [T]."""
        return self._length_T

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing is kept: attention itself writes them into the paged cache."""
        return key_states, value_states


class ProbedCache:
    """An empty past that notes what else a model wants of it."""

    def __init__(self) -> None:
        self.wanted: set[str] = set()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing came before."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """For mask functions."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """For mask functions: keys, and the position of the first."""
        return query_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As PositionOnlyCache's."""
        return key_states, value_states

    def __getattr__(self, name: str) -> Any:
        """Anything else."""
        if name not in _HARMLESS and not name.startswith("__"):
            self.wanted.add(name)
        raise AttributeError(name)
