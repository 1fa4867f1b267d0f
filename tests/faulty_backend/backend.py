"""A backend whose kernel is wrong: it stands for the norm behind the attention of one layer, and forgets a factor."""

from typing import Any

import torch

from actors.tensors.backend import RankModel
from actors.tensors.backends.reference import ReferenceBackend
from actors.words.messages import Substitution

LAYER = 2


class FaultyBackend(ReferenceBackend):
    """Substitutes without trying."""

    def optimize(self, model: RankModel) -> list[Substitution]:
        layers: Any = model.module.get_submodule(model.spec.layers_name)
        if not model.shard.layers[0] <= LAYER < model.shard.layers[1]:
            return []
        layers[LAYER].post_attention_layernorm.weight *= torch.tensor(1.1)
        return [Substitution("forgetful_norm", 1)]
