"""A step over a scratch cache, on which attention blocks and decoder layers are tried against their substitutes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from actors.decisions.model.shard_plan import AttentionShard
from actors.tensors.attention.kv_cache import KVCache
from actors.tensors.attention.metadata import Chunk, StepLayout, positions_of
from actors.tensors.backend import AttentionBackend, RankModel
from actors.tensors.backends.trial import random
from actors.tensors.model.attention_layer import CurrentStep, LayerAttention, detach
from actors.tensors.model.position_only_cache import PositionOnlyCache

_NUM_BLOCKS = 6
_TABLES = ((4, 0), (1, 5))
_NUM_PROMPT = 3  # tokens of the second sequence; the first one decodes one


class TrialStep:
    """One row that decodes behind more than a block of keys, and the first tokens of a prompt; random numbers."""

    def __init__(self, model: RankModel, shard: AttentionShard, block_size: int) -> None:
        self.shard = shard
        self.angles = model.spec.angles
        self.dtype: torch.dtype = getattr(torch, model.spec.dtype)
        device = torch.device("cpu")
        self._cache = KVCache([shard], _NUM_BLOCKS, block_size, self.dtype, device)
        self._stored = [random(*tensor.shape, dtype=self.dtype, device=device) for tensor in self._cache.tensors]
        chunks = [Chunk(0, 0, block_size + 2, 1), Chunk(1, 1, 0, _NUM_PROMPT)]
        self.positions_T = torch.from_numpy(positions_of(chunks))
        self._attention: AttentionBackend = model.attention
        self.metadata = model.attention.plan(StepLayout(chunks, torch.tensor(_TABLES)))
        num_tokens = len(self.positions_T)
        self.hidden = random(1, num_tokens, model.spec.hidden_size, dtype=self.dtype, device=device, seed=1)
        self.position_embeddings = None
        if self.angles is not None:
            dtype, shape = getattr(torch, self.angles.dtype), (1, num_tokens, self.angles.dim)
            cos, sin = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
            self.position_embeddings = cos, sin

    @contextmanager
    def attached_to(self, attention: nn.Module) -> Iterator[None]:
        """While it lasts, an attention module attends over the scratch cache."""
        current = CurrentStep()
        current.begin(self.metadata)
        LayerAttention(self._cache.layers[0], self._attention, current).attach(attention)
        try:
            yield
        finally:
            detach(attention)

    def run(self, module: nn.Module, forward: Callable[..., Any] | None = None) -> Any:
        """What a module gives, called as models call layers and attention; `forward`: by this in place of its own.

        The cache holds the same before each run.
        """
        for tensor, stored in zip(self._cache.tensors, self._stored, strict=True):
            tensor.copy_(stored)
        arguments: dict[str, Any] = {
            "hidden_states": self.hidden.clone(),
            "position_embeddings": self.position_embeddings,
            "attention_mask": None,
            "position_ids": self.positions_T.unsqueeze(0),
            "past_key_values": PositionOnlyCache(self.positions_T),
        }
        return module(**arguments) if forward is None else forward(module, **arguments)
