"""One rank's part of the model: built from the skeleton, pruned to its stage, cut to its shard, run on packed tokens.

T tokens of the step · H hidden size · Q rows of logits · V vocabulary rows of this shard.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.decisions.model_spec import ModelSpec
from actors.decisions.shard_plan import ShardPlan
from actors.tensors.attention import MODULE_ATTRIBUTE, CurrentStep, LayerAttention, StepAttention
from actors.tensors.kv_cache import KVCache
from actors.tensors.layers import NoEmbedding, ParallelLinear, PassThrough, VocabParallelEmbedding, parallelise
from actors.tensors.skeleton import build_skeleton, read_config
from actors.tensors.spec_reader import spec_of
from actors.words.errors import UnsupportedModel
from cluster.collectives import StageGroup


class StageModel:
    """The layers of one stage, as one shard holds them; on the last stage the model's own tail too."""

    def __init__(self, spec: ModelSpec, shard: ShardPlan, skeleton: PreTrainedModel, is_first_stage: bool) -> None:
        """`skeleton` is pruned and cut already; use `build`."""
        self.spec = spec
        self.shard = shard
        self.module = skeleton
        self.ignorable_keys = _ignorable_keys(skeleton)
        self._current = CurrentStep()
        self._state_1TH: torch.Tensor | None = None  # from the stage before
        self._output_1TH: torch.Tensor | None = None  # of the last owned layer
        first, end = shard.layers
        if not is_first_stage:
            self._layer(first).register_forward_pre_hook(self._enter, with_kwargs=True)
        if not shard.has_head:
            self._layer(end - 1).register_forward_hook(self._leave)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter of this rank by its name in the model; a tied head is not named twice."""
        return dict(self.module.named_parameters())

    def prepare(self) -> None:
        """Let every linear layer bring its tensors into the form it multiplies with; they hold their values now."""
        for module in self.module.modules():
            if isinstance(module, ParallelLinear):
                module.method.prepare(module)

    def join(self, group: StageGroup) -> None:
        """Let the layers exchange through the group of a new epoch."""
        for module in self.module.modules():
            if isinstance(module, ParallelLinear | VocabParallelEmbedding):
                module.group = group

    def attach(self, cache: KVCache) -> None:
        """Give each owned layer its part of the cache; called again when the cache is allocated anew."""
        first, end = self.shard.layers
        for layer in range(first, end):
            attention = LayerAttention(
                cache.keys[layer - first], cache.values[layer - first], self.spec.layers[layer].window, self._current
            )
            setattr(self._attention_module(layer), MODULE_ATTRIBUTE, attention)

    def forward(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        rows_Q: torch.Tensor,
        step: StepAttention,
        state_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        """→ hidden states [T, H] for the next stage, or on the last stage the logits [Q, V] of the rows asked for.

        `state_TH` comes from the stage before (None on the first). What the model's forward does ahead of its first
        layer runs on a dummy on later stages, and is thrown away.
        """
        self._current.attention = step
        self._state_1TH = None if state_TH is None else state_TH.unsqueeze(0)
        arguments: dict[str, Any] = {
            "input_ids": ids_T.unsqueeze(0),
            "position_ids": positions_T.unsqueeze(0),
            "use_cache": False,
        }
        try:
            if self.shard.has_head:
                logits_1QV = self.module(**arguments, logits_to_keep=rows_Q).logits
                assert isinstance(logits_1QV, torch.Tensor)
                return logits_1QV[0]
            self.module.base_model(**arguments)
            assert self._output_1TH is not None
            return self._output_1TH[0]
        finally:
            self._current.attention = self._state_1TH = self._output_1TH = None

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self._state_1TH is not None
        assert args, "the hidden states come first"
        return (self._state_1TH, *args[1:]), kwargs

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output_1TH = output[0] if isinstance(output, tuple) else output

    def _layer(self, layer: int) -> nn.Module:
        module: nn.Module = self.module.get_submodule(f"{self.spec.layers_name}.{layer}")
        return module

    def _attention_module(self, layer: int) -> nn.Module:
        parts = self._layer(layer).modules()
        found = [part for part in parts if getattr(part, "layer_idx", None) == layer and hasattr(part, "scaling")]
        if len(found) != 1:
            raise UnsupportedModel(f"{self.spec.architecture}: layer {layer} has {len(found)} attentions, not one")
        return found[0]


def build(
    spec: ModelSpec, shard: ShardPlan, folder: Path, group: StageGroup, device: torch.device, is_first_stage: bool
) -> StageModel:
    """Build one rank's model with empty parameters on the device.

    Raises ValueError when the folder on this node describes another model than the plan was made for.
    """
    dtype: torch.dtype = getattr(torch, spec.dtype)
    skeleton = build_skeleton(read_config(folder), dtype)
    if spec_of(skeleton, spec.dtype) != spec:
        raise ValueError(f"model.source: {folder} on this node describes another model than the plan; copy it anew")
    _prune(spec, shard, skeleton, dtype, device)
    for name, style in _owned_styles(spec, skeleton):
        parallelise(skeleton.get_submodule(name), style, group, shard.vocab_rows, name == spec.head_name)
    _allocate(spec, shard, skeleton, dtype, device)
    return StageModel(spec, shard, skeleton, is_first_stage)


def _prune(spec: ModelSpec, shard: ShardPlan, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Put stand-ins where another stage owns the module; lists keep their length and layers their number."""
    first, end = shard.layers
    for layer in range(spec.num_layers):
        if not first <= layer < end:
            model.set_submodule(f"{spec.layers_name}.{layer}", PassThrough())
    owned = {tensor.name.rpartition(".")[0] for tensor in shard.tensors}
    if shard.shares_tied_weight:
        owned.add(spec.head_name)
    for name in {parameter.name.rpartition(".")[0] for parameter in spec.parameters} | {spec.head_name}:
        if spec.layer_of(name) is None and name not in owned:
            is_embedding = name == spec.embedding_name
            model.set_submodule(name, NoEmbedding(spec.hidden_size, dtype, device) if is_embedding else PassThrough())


def _owned_styles(spec: ModelSpec, model: nn.Module) -> Iterable[tuple[str, str]]:
    """Modules that hold parameters here and have a style in the plan."""
    for name, module in model.named_modules():
        style = spec.style_of(name)
        if style is not None and next(module.parameters(recurse=False), None) is not None:
            yield name, style


def _allocate(spec: ModelSpec, shard: ShardPlan, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every meta parameter by an empty one of the shard's shape; nothing stays on meta."""
    for tensor in shard.tensors:
        module_name, _, attribute = tensor.name.rpartition(".")
        empty = torch.empty(tensor.shape, dtype=dtype, device=device)
        setattr(model.get_submodule(module_name), attribute, nn.Parameter(empty, requires_grad=False))
    if shard.shares_tied_weight:
        model.get_submodule(spec.head_name).weight = model.get_submodule(spec.embedding_name).weight
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    names = {name for name, _ in model.named_parameters()}
    assert names == {tensor.name for tensor in shard.tensors}, names ^ {tensor.name for tensor in shard.tensors}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _ignorable_keys(model: PreTrainedModel) -> frozenset[str]:
    """Patterns of checkpoint keys that Transformers drops for this model (regular expressions, searched)."""
    patterns: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001 - it has no public name
    # Older checkpoints carry the rotary frequencies of every layer; Transformers drops them wherever it computes them
    return frozenset(patterns | {r"rotary_emb\.inv_freq"})
