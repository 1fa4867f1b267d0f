"""Log-probabilities of given ids and of the likeliest ones, from logits sharded by vocabulary, without gathering them.

L rows · V vocabulary rows of this shard · C likeliest ids · P shards.
"""

from collections.abc import Callable, Sequence

import torch

from actors.decisions.model.shard_plan import Interval
from actors.tensors.backend import Download
from actors.tensors.sampling.ranking import best_of_all, best_of_shard, ids_of, scores_of
from actors.words.messages import TokenLogprobs
from cluster.collectives.interface import StageGroup


class LogprobDownload:
    """Log-probabilities on their way to the host."""

    def __init__(self, numbers: Download, num_top: Sequence[int]) -> None:
        """`numbers`: float64 [L, 1 + 2C], a row's own log-probability, then those of the likeliest ids, then these."""
        self._numbers, self._num_top = numbers, num_top

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return self._numbers.is_ready()

    def take(self) -> list[TokenLogprobs]:
        """Wait → those of every row."""
        numbers = self._numbers.take()
        count = numbers.shape[1] // 2
        top_logprobs, top_ids = numbers[:, 1 : 1 + count].tolist(), numbers[:, 1 + count :].long().tolist()
        return [
            TokenLogprobs(logprob, ids[:num], likeliest[:num])
            for logprob, ids, likeliest, num in zip(
                numbers[:, 0].tolist(), top_ids, top_logprobs, self._num_top, strict=True
            )
        ]


class LogprobReader:
    """One shard's part in reading log-probabilities. All shards of the last stage call it with the same rows."""

    def __init__(
        self, group: StageGroup, vocab_rows: Interval, vocab_size: int, download: Callable[[torch.Tensor], Download]
    ) -> None:
        """`download`: see Backend."""
        self._download = download
        self.group = group
        self.vocab_rows = vocab_rows
        self.vocab_size = vocab_size

    def read(self, logits_LV: torch.Tensor, ids_L: torch.Tensor, num_top: Sequence[int]) -> LogprobDownload:
        """Raw log-probabilities of each row's id (int64, on the device), and of its `num_top` likeliest ids."""
        logits_LV = logits_LV.float()
        count = min(max(num_top), self.vocab_size)
        # One gather for all: the bits of a float64 fill an int64
        numbers_L2 = torch.cat([self._own_logits(logits_LV, ids_L), logits_LV.logsumexp(1, keepdim=True)], 1).double()
        best_LC = best_of_shard(logits_LV, self.vocab_rows[0], count)
        gathered_PLC = self.group.all_gather(torch.cat([best_LC, numbers_L2.view(torch.int64)], dim=1))
        numbers_PL2 = gathered_PLC[:, :, count:].contiguous().view(torch.float64)
        log_total_L1 = numbers_PL2[:, :, 1:].logsumexp(0)
        logprobs_L1 = numbers_PL2[:, :, :1].amax(0) - log_total_L1
        best_LC = best_of_all(gathered_PLC[:, :, :count], count)
        found = torch.cat([logprobs_L1, scores_of(best_LC) - log_total_L1, ids_of(best_LC).double()], dim=1)
        return LogprobDownload(self._download(found), num_top)

    def _own_logits(self, logits_LV: torch.Tensor, ids_L: torch.Tensor) -> torch.Tensor:
        """The logits of the ids [L, 1]; -inf where another shard has the id."""
        first, end = self.vocab_rows
        is_elsewhere_L1 = ((ids_L < first) | (ids_L >= end)).unsqueeze(1)
        columns_L1 = (ids_L - first).unsqueeze(1).masked_fill(is_elsewhere_L1, 0)
        return logits_LV.gather(1, columns_L1).masked_fill_(is_elsewhere_L1, float("-inf"))
