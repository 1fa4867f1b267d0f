"""One rank's part of the model: built from the skeleton, pruned to its stage, cut to its shard, run on packed tokens.

T tokens of the step · H hidden size · Q logits rows · V vocabulary rows of this shard.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.decisions.model.plan import Plan
from actors.decisions.model.shard_plan import Interval, ShardPlan, TensorSlice
from actors.decisions.model.spec import ModelSpec, cut_dim, pattern_of
from actors.decisions.model.styles import STYLES
from actors.tensors.attention.kv_cache import KVCache
from actors.tensors.attention.metadata import AttentionMetadata
from actors.tensors.backend import AttentionBackend, Backend
from actors.tensors.model.attention_layer import CurrentStep, LayerAttention
from actors.tensors.model.linear import MergedColwise, MergedPart
from actors.tensors.model.parallel_layers import ColwiseLinear, NoEmbedding, ParallelLinear, PassThrough, owns_weight
from actors.tensors.model.parallelize import parallelize
from actors.tensors.model.position_only_cache import PositionOnlyCache
from actors.tensors.model.rotary import fix_rotary
from actors.tensors.model.skeleton import build_skeleton, config_digest, read_model_config
from actors.tensors.weights.checkpoint import Sources, find_sources
from actors.tensors.weights.conversion import Conversions
from actors.words.messages import Substitution
from cluster.collectives.interface import PresentGroup, StageGroup


class StageModel:
    """The layers of one stage, as one shard holds them; on the last stage also the model's final norm and head."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: ShardPlan,
        skeleton: PreTrainedModel,
        sources: Sources,
        group: PresentGroup,
        attention: AttentionBackend,
    ) -> None:
        """`skeleton` is pruned and cut already, and its layers exchange through `group`; see `build`."""
        self.spec = spec
        self.shard = shard
        self.module = skeleton
        self.sources = sources
        self.group = group
        self.attention = attention
        self.substitutions: list[Substitution] = []
        self._current = CurrentStep()
        # By reference: a backend may replace a whole layer, after which the name is not found
        self._attention_modules = [skeleton.get_submodule(attention.spec.name) for attention in shard.attentions]
        self._state_1TH: torch.Tensor | None = None  # from the stage before
        self._output_1TH: torch.Tensor | None = None  # of the last owned layer
        self._hooks: list[Any] = []
        self._hook_ends()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that this rank loads, by its name in the model; a tied head appears once, as the embedding."""
        return {tensor.name: _find(self.module, tensor.name) for tensor in self.shard.tensors}

    def prepare(self, backend: Backend) -> None:
        """Let the backend bring the weights, which are loaded now, into its form, and substitute modules."""
        products = self._products()
        while products:
            layers = products.pop()
            weights = [layer.weight for layer in layers]
            method = backend.linear_method(weights)
            if method is None and len(layers) > 1:
                products += [[layer] for layer in layers]
            elif method is not None and len(layers) == 1:
                layers[0].hand_over(method)
            elif method is not None:
                merged = MergedColwise(method, [len(weight) for weight in weights], [layer.bias for layer in layers])
                for index, layer in enumerate(layers):
                    layer.hand_over(MergedPart(merged, index))
        self._unhook_ends()  # trials run single layers, outside of any step
        self.substitutions = backend.optimize(self)
        self._hook_ends()

    def _products(self) -> list[list[ParallelLinear]]:
        """The linear layers whose weights a backend may take over, first those that are merged into one product."""
        tied = {f"{self.spec.embedding_name}.weight", f"{self.spec.head_name}.weight"}
        tied = tied if self.shard.shares_tied_weight else set()
        linears = {
            name: module
            for name, module in self.module.named_modules()
            if isinstance(module, ParallelLinear) and owns_weight(module) and f"{name}.weight" not in tied
        }
        together = [group for group in self.spec.same_input_groups(self.shard.layers) if _can_merge(group, linears)]
        merged = {name for group in together for name in group}
        alone = [[module] for name, module in linears.items() if name not in merged]
        return [[linears[name] for name in group] for group in together] + alone

    def join(self, group: StageGroup) -> None:
        """Make the layers exchange through the group of a new epoch."""
        self.group.group = group

    def is_finite(self) -> bool:
        """Whether every weight is finite; reads all of them."""
        tensors = [
            tensor for tensor in (*self.module.parameters(), *self.module.buffers()) if tensor.is_floating_point()
        ]
        if not all(bool(tensor.sum(dtype=torch.float32).isfinite()) for tensor in tensors):
            return False
        methods = [module.method for module in self.module.modules() if isinstance(module, ParallelLinear)]
        return all(method is None or method.is_finite() for method in methods)

    def take_exchange_s(self) -> float:
        """Seconds that the layers spent in exchanges with other shards since the last call."""
        return self.group.take_seconds()

    def attach(self, cache: KVCache) -> None:
        """Give each attention its part of the cache; called again when the cache is allocated again."""
        for module, layer in zip(self._attention_modules, cache.layers, strict=True):
            LayerAttention(layer, self.attention, self._current).attach(module)

    def forward(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        rows_Q: torch.Tensor,
        metadata: AttentionMetadata,
        state_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        """→ hidden states [T, H] for the next stage, or on the last stage the logits [Q, V] of the tokens `rows_Q`.

        `state_TH` comes from the stage before (None on the first). On later stages, the code of the
        model's forward ahead of its first layer runs on zeros, and its result is dropped.
        """
        self._current.begin(metadata)
        self._state_1TH = None if state_TH is None else state_TH.unsqueeze(0)
        arguments: dict[str, Any] = {
            "input_ids": ids_T.unsqueeze(0),
            "position_ids": positions_T.unsqueeze(0),
            "past_key_values": PositionOnlyCache(positions_T),
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
            self._current.end()
            self._state_1TH = self._output_1TH = None

    def _hook_ends(self) -> None:
        """Hook the first and the last owned layer, to bring in hidden states, and to keep those for the next stage."""
        first, end = self.shard.layers
        if not self.shard.has_embedding:
            self._hooks.append(self._layer(first).register_forward_pre_hook(self._enter, with_kwargs=True))
        if not self.shard.has_head:
            self._hooks.append(self._layer(end - 1).register_forward_hook(self._leave))

    def _unhook_ends(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self._state_1TH is not None
        if args:
            return (self._state_1TH, *args[1:]), kwargs
        assert "hidden_states" in kwargs
        return args, {**kwargs, "hidden_states": self._state_1TH}

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output_1TH = output[0] if isinstance(output, tuple) else output

    def _layer(self, layer: int) -> nn.Module:
        module: nn.Module = self.module.get_submodule(f"{self.spec.layers_name}.{layer}")
        return module


def _can_merge(group: tuple[str, ...], linears: dict[str, ParallelLinear]) -> bool:
    """Whether layers of all these names are here, cut by outputs, and alike in inputs, dtype and having a bias."""
    layers = [linears[name] for name in group if name in linears]
    if len(layers) != len(group) or any(type(layer) is not ColwiseLinear for layer in layers):
        return False
    return len({(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in layers}) == 1


def build(
    plan: Plan, rank: int, folder: Path, group: StageGroup, device: torch.device, attention: AttentionBackend
) -> StageModel:
    """Build one rank's model, with uninitialized tensors on the device.

    Raises ValueError when the folder on this node describes another model than the plan was made for, CheckpointError
    when its files do not hold what this rank needs.
    """
    spec, shard = plan.spec, plan.shards[rank]
    if config_digest(folder) != spec.config_digest:
        raise ValueError(f"model.source: {folder} on this node describes another model than the plan; copy it anew")
    dtype: torch.dtype = getattr(torch, spec.dtype)
    skeleton = build_skeleton(read_model_config(folder), dtype)
    fix_rotary(skeleton, plan.max_model_len)
    sources = find_sources(folder, spec, shard, Conversions(skeleton))  # needs the whole model, so before pruning
    _prune(spec, shard, skeleton, dtype, device)
    present = PresentGroup(group)
    cut = {tensor.name: tensor for tensor in shard.tensors}
    for name, module in skeleton.named_modules():
        style = spec.styles.get(pattern_of(name))
        is_here = not isinstance(module, PassThrough | NoEmbedding) and f"{name}.weight" not in spec.unused
        if style is not None and is_here:
            interval = _interval(style, cut.get(f"{name}.weight"))
            parallelize(module, style, present, interval, is_head=name == spec.head_name)
    _localize_heads(spec, shard, skeleton)
    _allocate(spec, shard, skeleton, device)
    return StageModel(spec, shard, skeleton, sources, present, attention)


def _interval(style: str, weight: TensorSlice | None) -> Interval:
    """The shard's part of the dimension that a style cuts."""
    cuts = STYLES[style].cuts
    if weight is None or cuts is None:
        return 0, 0
    dim = cut_dim(cuts, weight.full_shape)
    return (0, 0) if dim is None else (weight.intervals[dim][0][0], weight.intervals[dim][-1][1])


def _prune(spec: ModelSpec, shard: ShardPlan, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace modules that another stage owns; the list of layers keeps its length, and layers their numbers."""
    first, end = shard.layers
    for layer in range(spec.num_layers):
        if not first <= layer < end:
            model.set_submodule(f"{spec.layers_name}.{layer}", PassThrough(spec.layer_outputs))
    owned = {tensor.name.rpartition(".")[0] for tensor in shard.tensors}
    if shard.shares_tied_weight:
        owned.add(spec.head_name)
    outside = {parameter.name.rpartition(".")[0] for parameter in spec.parameters if parameter.place != "layer"}
    for name in outside | {spec.head_name}:
        if name not in owned:
            is_embedding = name == spec.embedding_name
            model.set_submodule(name, NoEmbedding(spec.hidden_size, dtype, device) if is_embedding else PassThrough())


def _localize_heads(spec: ModelSpec, shard: ShardPlan, model: nn.Module) -> None:
    """Set the head counts by which a module splits a fused projection to this shard's."""
    for attention in shard.attentions:
        module: Any = model.get_submodule(attention.spec.name)
        if "qkv_colwise" in {
            spec.styles.get(pattern_of(f"{attention.spec.name}.{name}")) for name, _ in module.named_children()
        }:
            module.config = copy.copy(module.config)
            for owner in (module, module.config):
                owner.num_attention_heads = owner.num_heads = attention.num_heads
                owner.num_key_value_heads = attention.num_kv_heads


def _allocate(spec: ModelSpec, shard: ShardPlan, model: nn.Module, device: torch.device) -> None:
    """Replace every tensor that is loaded by an uninitialized one of the shard's shape; nothing stays on meta."""
    for tensor in shard.tensors:
        module_name, _, attribute = tensor.name.rpartition(".")
        module = model.get_submodule(module_name)
        empty = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=device)
        is_buffer = attribute in dict(module.named_buffers(recurse=False))
        setattr(module, attribute, empty if is_buffer else nn.Parameter(empty, requires_grad=False))
    if shard.shares_tied_weight:
        model.get_submodule(spec.head_name).weight = model.get_submodule(spec.embedding_name).weight
    loaded = {tensor.name for tensor in shard.tensors}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if f"{prefix}.{name}" not in loaded:
                setattr(module, name, buffer.to(device))
    for name in spec.unused:
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, None)
    names = {name for name, _ in model.named_parameters()}
    assert names <= loaded, f"no slice is planned for {names - loaded}"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _find(model: nn.Module, name: str) -> torch.Tensor:
    module_name, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(module_name), attribute)
    assert isinstance(tensor, torch.Tensor)
    return tensor
