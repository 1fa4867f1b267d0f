"""Llama's decoder layers on CPU in one call for all of a stage: nothing of Python between one product and the next.

Where a step has prompts, two calls a layer, and torch's attention between them. A layer is recognised by its code, and
by what it is made of: all of that is kernels already (fusions.py, fused_attention.py). T tokens · H hidden size.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from actors.tensors import layer_kernels
from actors.tensors.attention import MODULE_ATTRIBUTE, CachedRows, LayerAttention, StepAttention
from actors.tensors.fused_attention import KernelAttention
from actors.tensors.fusions import KernelGatedMLP, KernelRMSNorm, computes_as
from actors.tensors.kernels import LIKE, rms_norm
from actors.tensors.layer_kernels import DTYPE
from actors.tensors.layers import RowwiseLinear, norm_eps
from actors.tensors.methods import Paneled
from cluster.collectives import LoneShard, PresentGroup
from cluster.exchange import HERE, SPENT_NS, alone
from cluster.shared_memory import SharedMemoryStage


class LayerRun:
    """Neighbouring layers of one stage, of equal sizes."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.output: torch.Tensor | None = None  # of the layer that computed last
        self._num_proven = 0  # layers that got what the one before put out, and all the same angles
        self._angles: object = None
        attention, out, down = layers[0].self_attn, layers[0].self_attn.o_proj.method, layers[0].mlp.down_proj.method
        self._head_dim, self._scaling, self._eps = (
            attention.head_dim,
            attention.scaling,
            norm_eps(layers[0].input_layernorm),
        )
        self._hidden, self._inside, self._num_heads = out.num_outputs, down.num_inputs, out.num_inputs // self._head_dim
        self._group: PresentGroup = attention.o_proj.group
        self._attentions: list[LayerAttention] = []  # that the table is of
        self._space = torch.empty(0, dtype=DTYPE)

    def put_through(self, layer: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor | None:
        """The output of one of the layers: the first computes for all. None where it has to compute by itself."""
        if self._num_proven < len(self.layers):
            return None
        if layer is self.layers[0]:
            self.output = self._all(hidden, *arguments["position_embeddings"])
        else:
            assert self.output is None or hidden is self.output, "something came between the layers"
        return self.output

    def prove(self, layer: Any, hidden: torch.Tensor, arguments: dict[str, Any], output: torch.Tensor) -> None:
        """Watch a layer that computed by itself, until all of one step did so as we would."""
        if self._num_proven == len(self.layers):
            return
        angles = arguments.get("position_embeddings")
        if layer is self.layers[0]:
            self._num_proven, self._angles = 1, angles
        elif layer is self.layers[self._num_proven] and hidden is self.output and angles is self._angles:
            self._num_proven += 1
        self.output = output
        if layer is self.layers[-1]:
            self.output = self._angles = None

    def _all(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
        attentions = [getattr(layer.self_attn, MODULE_ATTRIBUTE) for layer in self.layers]
        step, num_tokens = attentions[0].current.attention, hidden.shape[1]
        is_ours = hidden.dtype == cos.dtype == DTYPE and cos.shape == (1, num_tokens, self._head_dim)
        group = self._group.group
        if not is_ours or step is None or step.rows is not None or not isinstance(group, LoneShard | SharedMemoryStage):
            return None
        if attentions != self._attentions:
            self._tabulate(attentions)
        if not self._suits_cache:
            return None
        state, _memory = group.lend_state() if isinstance(group, SharedMemoryStage) else (alone(), None)
        x = hidden.clone(memory_format=torch.contiguous_format)
        buffers = (x.data_ptr(), *self._buffers(num_tokens))
        cos, sin = cos.contiguous(), sin.contiguous()
        spent_ns = state[SPENT_NS]
        rms_norm(
            buffers[0],
            self._table[0, layer_kernels.NORM],
            buffers[1],
            num_tokens,
            *[self._hidden] * 3,
            self._eps,
            LIKE[DTYPE],
        )
        compute = self._rows if all(not step.by_sight[sight].tiles for sight in self._sights) else self._mixed
        came = compute(step, buffers, (cos.data_ptr(), sin.data_ptr()), state)
        self._group.add_seconds(float(state[SPENT_NS] - spent_ns) / 1e9)
        if isinstance(group, SharedMemoryStage):
            group.check(came)
        return x

    def _rows(self, step: StepAttention, buffers: Any, angles: Any, state: Any) -> Any:
        """All tokens are rows of one token."""
        of_sights = [group for sight in self._sights for group in step.by_sight[sight].groups]
        rows = of_sights[0]
        assert isinstance(rows, CachedRows)
        first_keys = np.stack([group.first_keys_B for group in of_sights if isinstance(group, CachedRows)])
        where = rows.tables, rows.places_B, rows.positions_B, first_keys
        slots = step.slots_T.numpy()
        return layer_kernels.run(
            self._table, buffers, angles, slots, where, self._sizes, self._eps, self._scaling, state
        )

    def _mixed(self, step: StepAttention, buffers: Any, angles: Any, state: Any) -> Any:
        """Some are a prompt's: torch computes their attention."""
        slots = step.slots_T.numpy()
        for i, attention in enumerate(self._attentions):
            layer_kernels.project(self._table[i], buffers, angles, slots, self._sizes)
            attended = attention.attend_stored(self._query_ThD.transpose(0, 1), self._scaling)
            came = layer_kernels.finish(
                self._table, i, attended.data_ptr(), buffers, len(slots), self._sizes, self._eps, state
            )
            if came != HERE:
                break
        return came

    def _buffers(self, num_tokens: int) -> list[int]:
        """Where each of what lies between the products lies; kept for steps of as many tokens or fewer."""
        num_kv_heads = self._sizes[3]
        queries = self._num_heads * self._head_dim
        widths = (
            self._hidden,
            queries + 2 * num_kv_heads * self._head_dim,
            queries,
            queries,
            2 * self._inside,
            self._inside,
        )
        if self._space.numel() < num_tokens * sum(widths):
            self._space = torch.empty(num_tokens * sum(widths), dtype=DTYPE)
        parts = torch.split(self._space[: num_tokens * sum(widths)], [num_tokens * width for width in widths])
        self._query_ThD = parts[2].view(num_tokens, self._num_heads, self._head_dim)
        return [part.data_ptr() for part in parts]

    def _tabulate(self, attentions: list[LayerAttention]) -> None:
        """Write down where everything lies; the cache is another when it was allocated anew."""
        self._attentions = attentions
        self._suits_cache = all(attention.has_dot and attention.spec.softcap is None for attention in attentions)
        self._sights = sorted({attention.spec.sight for attention in attentions}, key=repr)
        _, block_size, num_kv_heads, _ = attentions[0].keys_NbHD.shape
        self._sizes = self._hidden, self._inside, self._num_heads, num_kv_heads, self._head_dim, block_size
        self._table = np.array(
            [self._row(layer, attention) for layer, attention in zip(self.layers, attentions, strict=True)]
        )

    def _row(self, layer: Any, attention: LayerAttention) -> list[int]:
        qkv, gate_up = layer.self_attn.siblings.addresses(), layer.mlp.siblings.addresses()
        (out, no_bias), (down, _) = layer.self_attn.o_proj.method.addresses(), layer.mlp.down_proj.method.addresses()
        norm, mlp_norm = layer.input_layernorm.weight.data_ptr(), layer.post_attention_layernorm.weight.data_ptr()
        keys, values = attention.keys_NbHD.data_ptr(), attention.values_NbHD.data_ptr()
        sight = self._sights.index(attention.spec.sight)
        return [norm, *qkv, out, mlp_norm, *gate_up, down, no_bias, keys, values, sight]


class KernelLayer(nn.Module):
    """Stands for a decoder layer that is one of a run."""

    run: LayerRun
    original: Callable[..., torch.Tensor]  # its own forward

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[1, T, H] → [1, T, H]; the layers after the first of a run give on what that has computed for all."""
        output = self.run.put_through(self, hidden_states, kwargs)
        if output is None:
            output = self.original(self, hidden_states, *args, **kwargs)
            self.run.prove(self, hidden_states, kwargs, output)
        return output


def fuse_layers(model: nn.Module) -> None:
    """Let neighbouring layers that are all kernels run as one. All linear layers are packed; CPU only."""
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        run: list[Any] = []
        for layer in layers:
            if _suits(layer) and (not run or _sizes_of(layer) == _sizes_of(run[0])):
                run.append(layer)
            elif run:
                _join(run)
                run = [layer] if _suits(layer) else []
        if run:
            _join(run)


def _join(layers: list[Any]) -> None:
    run = LayerRun(layers)
    for layer in layers:
        layer.run, layer.original = run, inspect.unwrap(type(layer).forward)
        layer.__class__ = KernelLayer


def _suits(layer: Any) -> bool:
    if not computes_as(layer, LlamaDecoderLayer):
        return False
    attention, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
    if type(attention) is not KernelAttention or type(mlp) is not KernelGatedMLP:
        return False
    outs: list[Any] = [attention.o_proj, mlp.down_proj]
    return (
        all(type(norm) is KernelRMSNorm and norm.weight.dtype == DTYPE for norm in norms)
        and all(type(out) is RowwiseLinear and isinstance(out.method, Paneled) for out in outs)
        and [out.bias for out in outs] == [None, None]
        and attention.siblings.addresses() is not None
        and mlp.siblings.addresses() is not None
        and norm_eps(norms[0]) == norm_eps(norms[1])
    )


def _sizes_of(layer: Any) -> tuple[object, ...]:
    """What all layers of a run have in common."""
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    outs = attention.o_proj.method, layer.mlp.down_proj.method
    sizes = [size for out in outs for size in (out.num_inputs, out.num_outputs)]
    return (*sizes, attention.head_dim, attention.scaling, *map(norm_eps, norms))
