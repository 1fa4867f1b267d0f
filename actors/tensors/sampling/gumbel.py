"""The Gumbel arg-max over rows of logits, in plain torch: noise, scores, and the best token of each row.

R rows to sample · V vocabulary rows of this shard.
"""

import torch

from actors.tensors.sampling.noise import exponential


def gumbel_argmax(
    logits_RV: torch.Tensor, first_id: int, temperatures_R1: torch.Tensor | None, keys_R1: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (float32) and ids (int64) of the best token of each row [R]; of equal scores the lowest id, NaN above all.

    The score is logit / temperature - log(noise) in rows with a temperature above 0, and the logit in rows with 0 (or
    in all rows where the temperatures are None).
    """
    scores_RV = logits_RV.float()
    if temperatures_R1 is not None and keys_R1 is not None:
        ids_V = torch.arange(first_id, first_id + logits_RV.shape[1], device=logits_RV.device)
        noisy_RV = (scores_RV / temperatures_R1).sub_(exponential(keys_R1, ids_V).log_())
        scores_RV = torch.where(temperatures_R1 > 0, noisy_RV, scores_RV)
    best = scores_RV.max(dim=1)  # torch takes the first of equal scores, and NaN above all
    return best.values, best.indices + first_id
