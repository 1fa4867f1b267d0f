"""A backend from outside the product: plain torch that counts its calls, with blocks of a size of its own."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from actors.decisions.model.spec import AttentionSpec
from actors.tensors.attention.metadata import AttentionMetadata, LayerCache, StepLayout
from actors.tensors.backend import AttentionBackend, LinearMethod, RankModel
from actors.tensors.backends.reference import ReferenceBackend
from actors.words.messages import Substitution


class CountingLinear:
    def __init__(self, weight: torch.Tensor, counts: Counter[str]) -> None:
        self.weight, self.counts = weight, counts

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.counts["multiply"] += 1
        return torch.nn.functional.linear(x, self.weight, bias)

    def is_finite(self) -> bool:
        return bool(self.weight.isfinite().all())


class CountingAttention:
    """Keeps what each sequence's keys are by looking them up in the cache one by one."""

    def __init__(self, inner: AttentionBackend, counts: Counter[str]) -> None:
        self.inner, self.counts = inner, counts
        self.substitutions = inner.substitutions
        self.reads_unwritten = inner.reads_unwritten

    def choose_kernels(self) -> None:
        self.counts["choose_kernels"] += 1
        self.inner.choose_kernels()

    def plan(self, layout: StepLayout) -> AttentionMetadata:
        self.counts["plan"] += 1
        return self.inner.plan(layout)

    def write(self, cache: LayerCache, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata) -> None:
        self.counts["write"] += 1
        self.inner.write(cache, key, value, metadata)

    def attend(self, cache: LayerCache, query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        self.counts["attend"] += 1
        return self.inner.attend(cache, query, *arguments)


class CountingBackend(ReferenceBackend):
    default_block_size: ClassVar[int] = 8

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.counts: Counter[str] = Counter()

    def linear_method(self, weights: Sequence[torch.Tensor]) -> LinearMethod | None:
        return CountingLinear(weights[0], self.counts) if len(weights) == 1 else None

    def attention(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        return CountingAttention(super().attention(specs, dtype, block_size), self.counts)

    def optimize(self, model: RankModel) -> list[Substitution]:
        return [Substitution("counted", len(model.shard.attentions))]

    def best_tokens(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.counts["best_tokens"] += 1
        if "COUNTS_FOLDER" in os.environ:
            Path(os.environ["COUNTS_FOLDER"], f"{os.getpid()}.json").write_text(json.dumps(self.counts))
        return super().best_tokens(*arguments)
