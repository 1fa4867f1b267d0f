"""Turns a model's modules into the parallel layers that their styles name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actors.decisions.model.shard_plan import Interval
from actors.decisions.model.styles import STYLES
from actors.tensors.model.parallel_layers import (
    ColwiseEmbedding,
    ColwiseLinear,
    ColwiseRMSNorm,
    GatheredColwiseLinear,
    ParallelLinear,
    RowwiseLinear,
    SplitInputRowwiseLinear,
    VocabParallelEmbedding,
    rebase,
)
from cluster.collectives.interface import StageGroup

_LINEAR: dict[str, type[ParallelLinear]] = {
    "colwise": ColwiseLinear,
    "packed_colwise": ColwiseLinear,
    "qkv_colwise": ColwiseLinear,
    "colwise_gather_output": GatheredColwiseLinear,
    "rowwise": RowwiseLinear,
    "rowwise_split_input": SplitInputRowwiseLinear,
}


def parallelize(module: nn.Module, style: str, group: StageGroup, interval: Interval, is_head: bool = False) -> None:
    """`interval`: this shard's part of the dimension that is cut. Raises UnsupportedModel if no parallel layer fits.

    The head's logits stay sharded by vocabulary: the sampler needs no gather, even if the style is
    `colwise_gather_output`.
    """
    assert style in STYLES, style
    if is_head:
        rebase(module, ColwiseLinear).set_group(group)
        return
    match style:
        case _ if style in _LINEAR:
            linear = rebase(module, _LINEAR[style]).set_group(group)
            if isinstance(linear, SplitInputRowwiseLinear):
                linear.columns = interval
        case "embedding_rowwise":
            rebase(module, VocabParallelEmbedding).set_shard(group, interval)
        case "embedding_colwise":
            rebase(module, ColwiseEmbedding).group = group
        case "norm_colwise":
            ColwiseRMSNorm.rebase(module, group)
        case "moe_tp_experts" | "all_reduce":
            _after(module, lambda output: group.all_reduce(output.contiguous()))
        case "moe_identity_expert":
            _after(module, lambda output: output / group.size)
        case _:
            pass  # every shard holds it whole


def _after(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply `change` to what a module returns."""

    def hook(called: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return change(output)

    module.register_forward_hook(hook)
