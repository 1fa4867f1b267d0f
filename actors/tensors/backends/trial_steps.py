"""Trial steps over a scratch cache, on which attention blocks and layers are compared with their substitutes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from actors.decisions.model.shard_plan import AttentionShard
from actors.decisions.model.spec import ModelSpec
from actors.tensors.attention.kv_cache import KVCache
from actors.tensors.attention.metadata import AttentionMetadata, Chunk, StepLayout, positions_of
from actors.tensors.backend import AttentionBackend, RankModel
from actors.tensors.backends.trial import Reason, difference, random
from actors.tensors.model.attention_layer import CurrentStep, LayerAttention, detach
from actors.tensors.model.position_only_cache import PositionOnlyCache

_NUM_BLOCKS = 8
_TABLES = ((4, 0, 2, 6), (1, 5, 3, 7))  # as many blocks as blocks of one token take
_NUM_PROMPT = 3  # tokens of the second sequence; the first one decodes one


class _Step(NamedTuple):
    metadata: AttentionMetadata
    positions_T: torch.Tensor
    hidden: torch.Tensor  # [1, T, hidden]
    nudged: torch.Tensor  # the same, rounded once more
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None


class TrialSteps:
    """Two steps: a row that decodes after more than a block of keys, alone, and together with the start of a prompt.

    The module is told that the row is the last position that the model knows: some scale their queries by positions,
    from far out on.
    """

    def __init__(self, model: RankModel, shard: AttentionShard, block_size: int, device: torch.device) -> None:
        self.shard = shard
        self.device = device
        self.block_size = block_size
        self.angles = model.spec.angles
        self.dtype: torch.dtype = getattr(torch, model.spec.dtype)
        self._cache = KVCache([shard], _NUM_BLOCKS, block_size, self.dtype, device)
        self._stored = [random(*tensor.shape, dtype=self.dtype, device=device) for tensor in self._cache.tensors]
        self._attention: AttentionBackend = model.attention
        self._current = CurrentStep()
        row, prompt = Chunk(0, 0, block_size + 2, 1), Chunk(1, 1, 0, _NUM_PROMPT)
        self._steps = [self._step(model.spec, chunks) for chunks in ([row], [row, prompt])]

    def _step(self, spec: ModelSpec, chunks: list[Chunk]) -> _Step:
        positions_T, hidden_size = torch.from_numpy(positions_of(chunks)), spec.hidden_size
        positions_T[0] = spec.max_position - 1
        hidden = random(1, len(positions_T), hidden_size, dtype=self.dtype, device=self.device, seed=1)
        signs = random(*hidden.shape, dtype=torch.float32, device=self.device, seed=4).sign()
        nudged = (hidden.float() * (1 + torch.finfo(self.dtype).eps / 2 * signs)).to(self.dtype)
        embeddings = None
        if self.angles is not None:
            dtype, shape = getattr(torch, self.angles.dtype), (1, len(positions_T), self.angles.dim)
            embeddings = (
                random(*shape, dtype=dtype, device=self.device, seed=2),
                random(*shape, dtype=dtype, device=self.device, seed=3),
            )
        metadata = self._attention.plan(StepLayout(chunks, torch.tensor(_TABLES)))
        return _Step(metadata, positions_T, hidden, nudged, embeddings)

    @contextmanager
    def attached_to(self, attention: nn.Module) -> Iterator[None]:
        """A context in which an attention module attends over the scratch cache."""
        LayerAttention(self._cache.layers[0], self._attention, self._current).attach(attention)
        try:
            yield
        finally:
            detach(attention)

    def run(
        self, module: nn.Module, forward: Callable[..., Any] | None = None, is_nudged: bool = False
    ) -> list[torch.Tensor]:
        """The output of a module in each step, called as models call layers and attention modules.

        The cache holds the same before each step. `forward`: called instead of the module's own. `is_nudged`: on inputs
        that were rounded once more.
        """
        return [self._run(step, module, forward, is_nudged) for step in self._steps]

    def difference(self, module: nn.Module, forward: Callable[..., Any]) -> Reason | None:
        """Why `forward` cannot stand for a module's own; None: it gives the same, but for one more rounding."""
        return difference(
            lambda: self.run(module), lambda: self.run(module, forward), lambda: self.run(module, is_nudged=True)
        )

    def _run(self, step: _Step, module: nn.Module, forward: Callable[..., Any] | None, is_nudged: bool) -> torch.Tensor:
        for tensor, stored in zip(self._cache.tensors, self._stored, strict=True):
            tensor.copy_(stored)
        arguments: dict[str, Any] = {
            "hidden_states": (step.nudged if is_nudged else step.hidden).clone(),
            "position_embeddings": step.position_embeddings,
            "attention_mask": None,
            "position_ids": step.positions_T.unsqueeze(0),
            "past_key_values": PositionOnlyCache(step.positions_T),
        }
        self._current.begin(step.metadata)
        try:
            output = module(**arguments) if forward is None else forward(module, **arguments)
        finally:
            self._current.end()
        found = output[0] if isinstance(output, tuple) else output
        assert isinstance(found, torch.Tensor)
        return found
