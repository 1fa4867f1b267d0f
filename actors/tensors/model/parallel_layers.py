"""The parallel layers, which replace a model's own by the styles of its plan: plain tensors and one collective each."""

from typing import Any, Self, TypeVar

import torch
from torch import nn

from actors.decisions.model.shard_plan import Interval
from actors.tensors.backend import LinearMethod
from actors.words.errors import UnsupportedModel
from cluster.collectives.interface import StageGroup

Layer = TypeVar("Layer", bound=nn.Module)


class ParallelLinear(nn.Linear):
    """A linear layer of which this shard holds a part."""

    group: StageGroup
    method: LinearMethod | None = None  # None: torch's product by the weight as it is

    def set_group(self, group: StageGroup) -> Self:
        """Set the group through which it exchanges."""
        self.group = group
        return self

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[*, in] → [*, out on this shard], plus the bias if one is given."""
        if self.method is None:
            return nn.functional.linear(x, self.weight, bias)
        return self.method.multiply(x, bias)

    def hand_over(self, method: LinearMethod) -> None:
        """Let a method hold the weight from now on; an empty weight stays, for its dtype and device."""
        self.method = method
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


def owns_weight(layer: ParallelLinear) -> bool:
    """Whether a method may take over the weight: only our own forward reads it, and it has not been taken over yet."""
    return type(layer).__module__ == __name__ and layer.weight.numel() > 0


class ColwiseLinear(ParallelLinear):
    """Some rows of the weight: the whole input gives this shard's part of the output, without an exchange."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """[*, in] → [*, out on this shard]."""
        return self.multiply(input, self.bias)


class RowwiseLinear(ParallelLinear):
    """Some columns of the weight: this shard's part of the input gives one summand of the whole output."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """[*, in on this shard] → [*, out], the same bits on every shard. The bias is added once, after the sum."""
        out = self.group.all_reduce(self.multiply(input, None))
        return out if self.bias is None else out.add_(self.bias)


class GatheredColwiseLinear(ColwiseLinear):
    """Some rows of the weight; the outputs of all shards are gathered."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """[*, in] → [*, out], the same on every shard."""
        return gather_last(self.group, super().forward(input))


class SplitInputRowwiseLinear(RowwiseLinear):
    """Some columns of the weight, for an input that every shard has whole and takes its part of."""

    columns: Interval

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """[*, in] → [*, out]."""
        return super().forward(input[..., slice(*self.columns)])


class ColwiseEmbedding(nn.Embedding):
    """Some columns of the table; the outputs of all shards are gathered."""

    group: StageGroup

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Embedding's name
        """Ids [*] → [*, hidden]."""
        return gather_last(self.group, super().forward(input))


def norm_eps(module: nn.Module) -> Any:
    """The epsilon of a root-mean-square norm, whatever its family calls it; None where there is none."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module has the parts of a root-mean-square norm: one weight [n], and an epsilon."""
    if isinstance(module, nn.LayerNorm):
        return False
    weights = dict(module.named_parameters())
    return set(weights) == {"weight"} and weights["weight"].dim() == 1 and isinstance(norm_eps(module), float)


class ColwiseRMSNorm(nn.Module):
    """A root-mean-square norm over the heads of all shards, of which this one has some."""

    weight: torch.Tensor  # [n on this shard]
    group: StageGroup
    eps: float

    @classmethod
    def rebase(cls, module: nn.Module, group: StageGroup) -> None:
        """Turn a norm into this, in place. Raises UnsupportedModel for a norm of another kind."""
        eps = norm_eps(module)
        if eps is None or {name for name, _ in module.named_parameters()} != {"weight"}:
            raise UnsupportedModel(f"{type(module).__name__} is no root-mean-square norm; it cannot be cut")
        module.__class__ = cls
        module.group, module.eps = group, eps  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, n] → [*, n]. Heads that several shards hold are held equally often, so that the mean stays the same."""
        x_float32 = x.float()
        squares = self.group.all_reduce(x_float32.pow(2).sum(-1, keepdim=True))
        mean = squares / (x.shape[-1] * self.group.size)
        return (self.weight * (x_float32 * torch.rsqrt(mean + self.eps))).to(x.dtype)


class VocabParallelEmbedding(nn.Embedding):
    """Some rows of the table: ids of other shards give zeros, and the sum over the shards is the whole output."""

    group: StageGroup
    rows: Interval

    def set_shard(self, group: StageGroup, rows: Interval) -> Self:
        """Set which rows these are, and the group of the shards that hold the others."""
        self.group = group
        self.rows = rows
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Embedding's name
        """Ids [*] → [*, hidden]."""
        if self.group.size == 1:
            return nn.functional.embedding(input, self.weight)
        first, end = self.rows
        is_elsewhere = (input < first) | (input >= end)
        hidden = nn.functional.embedding((input - first).masked_fill_(is_elsewhere, 0), self.weight)
        return self.group.all_reduce(hidden.masked_fill_(is_elsewhere.unsqueeze(-1), 0))


def gather_last(group: StageGroup, part: torch.Tensor) -> torch.Tensor:
    """Gather every shard's part [*, n], of equal sizes → [*, n × shards], in shard order."""
    return torch.cat(tuple(group.all_gather(part.contiguous())), dim=-1)


class PassThrough(nn.Module):
    """Stands for a module of another stage: returns its first argument, whatever the others are."""

    def __init__(self, num_outputs: int = 0) -> None:
        """`num_outputs`: the length of the tuple that the module returned, 0 for a tensor alone."""
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[*] → the same tensor."""
        return (hidden_states, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden_states


class NoEmbedding(nn.Module):
    """Stands for the embedding on later stages: zeros of the right shape, for the code ahead of the first layer."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.zeros(hidden_size, dtype=dtype, device=device)  # some models read its dtype and device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [*] → zeros [*, hidden], without memory."""
        return self.weight.expand(*ids.shape, -1)


def rebase(module: nn.Module, base: type[Layer]) -> Layer:
    """Turn a model's own module into one of the parallel layers, in place, and keep what its subclass adds.

    A subclass that scales in `forward` around `super().forward` (Gemma's embedding) then scales around ours.
    """
    original = type(module)
    plain = nn.Linear if issubclass(base, nn.Linear) else nn.Embedding
    if not issubclass(original, plain):
        raise UnsupportedModel(f"{original.__name__} is no {plain.__name__}: no parallel layer stands for it")
    module.__class__ = base if original is plain else type(original.__name__, (original, base), {})
    assert isinstance(module, base)
    return module
