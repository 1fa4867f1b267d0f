"""Samples the next ids from logits that are sharded by vocabulary: the same ids on every shard.

R rows to sample · K of them truncated · V vocabulary rows of this shard · P shards.
Sampling at a temperature is a Gumbel arg-max: with E independent Exp(1) per token, argmax(logit / temperature - log E)
is distributed as softmax(logit / temperature). Truncated tokens get the score -inf. A row's id depends only on its own
logits, parameters and history.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from actors.decisions.model.shard_plan import Interval
from actors.tensors.backend import Upload
from actors.tensors.sampled_ids import SampledIds
from actors.tensors.sampling.logits_processors import LogitsProcessors, SamplingRow
from actors.tensors.sampling.noise import noise_key
from actors.tensors.sampling.ranking import ids_of, scores_of, sort_keys_of
from actors.tensors.sampling.truncation import Truncation, VocabularySearch, truncation_thresholds
from actors.words.messages import NOT_A_NUMBER
from cluster.collectives.interface import StageGroup

_OUTCOMES = 1 << 31  # above all ids: where an id is exchanged, this less an outcome stands for the outcome
_MIN_TEMPERATURE = 1e-6  # below, finite logits could become infinite scores; this is as good as greedy

BestTokens = Callable[
    [torch.Tensor, int, torch.Tensor | None, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
]  # see Backend.best_tokens


@dataclass(frozen=True)
class SamplingBatch:
    """How R rows are sampled, on the device."""

    temperatures_R1: torch.Tensor | None  # float32, 0 where greedy; None: all rows are greedy
    keys_R1: torch.Tensor | None  # int64, of (seed, position)
    logits_processors: LogitsProcessors | None
    truncation: Truncation | None
    outcomes_R: torch.Tensor | None = None  # int64, negative where a row gets this in place of an id

    @classmethod
    def of(
        cls,
        rows: Sequence[SamplingRow],
        upload: Upload,
        sampled_ids: SampledIds | None = None,
        outcomes: Mapping[int, int] = MappingProxyType({}),
    ) -> "SamplingBatch":
        """Bring rows into this form. `sampled_ids` knows the ids that the rows do not know yet.

        `outcomes`: by row, the negative number that it gets in place of an id.
        """
        processors = LogitsProcessors.of(rows, upload, sampled_ids)
        codes = [outcomes.get(index, 0) for index in range(len(rows))]
        outcomes_R = upload(torch.tensor(codes)) if outcomes else None
        sampling = [row.sampling for row in rows]
        if all(params.temperature == 0 for params in sampling):
            return cls(None, None, processors, None, outcomes_R)
        assert all(params.temperature == 0 or params.seed is not None for params in sampling), "the engine draws a seed"
        temperatures = torch.tensor(
            [[max(params.temperature, _MIN_TEMPERATURE) if params.temperature else 0.0] for params in sampling],
            dtype=torch.float32,
        )
        keys = torch.tensor([[noise_key(row.sampling.seed or 0, row.position)] for row in rows])
        return cls(upload(temperatures), upload(keys), processors, Truncation.of(rows, upload), outcomes_R)


class Sampler:
    """One shard's part in sampling. All shards of the last stage call it with the same rows."""

    def __init__(
        self,
        group: StageGroup,
        vocab_rows: Interval,
        vocab_size: int,
        best_tokens: BestTokens,
        runs_ahead: bool = False,
        search: VocabularySearch | None = None,
    ) -> None:
        """`best_tokens` is the backend's Gumbel arg-max over this shard's rows of the vocabulary.

        `runs_ahead`: see Backend; then nothing that depends on the logits is read on the host. `search`: the backend's
        `lowest_kept`.
        """
        self.group = group
        self.vocab_rows = vocab_rows
        self.vocab_size = vocab_size
        self._best_tokens = best_tokens
        self._runs_ahead, self._search = runs_ahead, search

    def sample(self, logits_RV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Logits of this shard's vocabulary rows → ids [R], int64, the same on every shard.

        NOT_A_NUMBER where the best score is NaN or infinite: there is no distribution to sample from. An outcome of the
        batch where this shard or another one has one for the row.
        """
        if not logits_RV.shape[0]:
            return torch.empty(0, dtype=torch.int64, device=logits_RV.device)
        if batch.logits_processors is not None:
            logits_RV = batch.logits_processors.apply(logits_RV.float(), self.vocab_rows[0])
        scores_R, ids_R = self._best_of_shard(logits_RV, batch)
        if batch.outcomes_R is not None:
            has_outcome_R = batch.outcomes_R < 0
            scores_R = scores_R.masked_fill(has_outcome_R, float("inf"))
            ids_R = torch.where(has_outcome_R, _OUTCOMES - batch.outcomes_R, ids_R)
        return self._best_of_all_shards(scores_R, ids_R)

    def _best_of_shard(self, logits_RV: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of this shard's tokens in each row: scores, float32 [R], and ids, int64 [R]."""
        first, end = self.vocab_rows
        temperatures_R1 = batch.temperatures_R1
        if batch.truncation is not None:
            assert temperatures_R1 is not None, "greedy rows are not truncated"
            is_random_R1 = temperatures_R1 > 0
            scores_RV = logits_RV.float() / temperatures_R1.masked_fill(~is_random_R1, 1)
            self._truncate(scores_RV, batch.truncation, torch.arange(first, end, device=logits_RV.device))
            logits_RV = torch.where(is_random_R1, scores_RV, logits_RV.float())
            temperatures_R1 = is_random_R1.float()
        return self._best_tokens(logits_RV, first, temperatures_R1, batch.keys_R1)

    def _truncate(self, scores_RV: torch.Tensor, truncation: Truncation, ids_V: torch.Tensor) -> None:
        """Set the scores of truncated tokens to -inf."""
        scores_KV = scores_RV.index_select(0, truncation.rows_K)
        lowest_K1 = truncation_thresholds(
            scores_KV, truncation, self.group, self.vocab_rows, self.vocab_size, self._runs_ahead, self._search
        )
        lowest_score_K1, last_id_K1 = scores_of(lowest_K1), ids_of(lowest_K1)
        is_out_KV = (scores_KV < lowest_score_K1) | ((scores_KV == lowest_score_K1) & (ids_V > last_id_K1))
        scores_RV.index_copy_(0, truncation.rows_K, scores_KV.masked_fill_(is_out_KV, float("-inf")))

    def _best_of_all_shards(self, scores_R: torch.Tensor, ids_R: torch.Tensor) -> torch.Tensor:
        scores_R = scores_R.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        sort_keys_PR = self.group.all_gather(sort_keys_of(scores_R, ids_R))
        sort_keys_R = sort_keys_PR.amax(dim=0)
        ids_R = ids_of(sort_keys_R)
        instead_R = torch.where(ids_R > _OUTCOMES, _OUTCOMES - ids_R, NOT_A_NUMBER)
        return torch.where(scores_of(sort_keys_R).isfinite(), ids_R, instead_R)
