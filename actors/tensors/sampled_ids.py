"""The ids that were sampled lately, on the device: steps read there those that the host does not know yet."""

import torch

UNKNOWN_ID = -1  # instead of an id: one that so far only the device knows


class SampledIds:
    """Of every row of the sequence table the ids sampled for its last positions.

    P rows of the table, and one for padding · D last positions · N tokens, all int64.
    """

    def __init__(self, num_rows: int, num_positions: int, device: torch.device) -> None:
        self.padding = num_rows  # the row of tokens that belong to no sequence
        self.num_positions = num_positions
        self._ids_PD = torch.zeros((num_rows + 1) * num_positions, dtype=torch.int64, device=device)

    def put(self, rows_N: torch.Tensor, positions_N: torch.Tensor, ids_N: torch.Tensor) -> None:
        """Keep the ids that rows sampled for these positions."""
        self._ids_PD.index_copy_(0, self._places(rows_N, positions_N), ids_N)

    def resolve(self, ids_N: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Ids with the sampled ones in place of UNKNOWN_ID; rows and positions are those of the ids."""
        return torch.where(ids_N == UNKNOWN_ID, self._ids_PD[self._places(rows_N, positions_N)], ids_N)

    def _places(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        return rows_N * self.num_positions + positions_N % self.num_positions
