"""Llama's decoder layers on CPU in one call for all of a stage: nothing of Python between one product and the next.

A layer is recognised by its code, and by what it is made of: all of that is kernels already (fusions.py,
fused_attention.py). T tokens of the step · Q those whose logits are asked for · H hidden size · D dimension of a head.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from actors.tensors.attention.layer import (
    MODULE_ATTRIBUTE,
    CachedRows,
    DecodeGroup,
    Indices,
    LayerAttention,
    StepAttention,
)
from actors.tensors.backends.cpu.kernels import DTYPE_TAGS, rms_norm
from actors.tensors.backends.cpu.llama import kernel as layer_kernels
from actors.tensors.backends.cpu.llama.attention import KernelAttention
from actors.tensors.backends.cpu.llama.kernel import ATTEND, DTYPE, FINISH, PROJECT
from actors.tensors.backends.cpu.module_kernels import KernelGatedMLP, KernelRMSNorm, computes_as
from actors.tensors.model.linear import PanelPackedLinear
from actors.tensors.model.parallel_layers import RowwiseLinear, norm_eps
from cluster.collectives.exchange import OK, SPENT_NS, alone
from cluster.collectives.interface import LoneShard, PresentGroup
from cluster.collectives.shared_memory import SharedMemoryStage

_Rows: TypeAlias = (
    "tuple[Indices, Indices, Indices, Indices]"  # tables, places, positions, first keys of each mask_spec
)
_NONE = np.zeros(0, np.int64)
_NO_ROWS: _Rows = _NONE[None], _NONE, _NONE, _NONE[None]


def _rows_of(of_sights: Sequence[DecodeGroup | CachedRows]) -> _Rows:
    """The same rows for each of the mask_specs."""
    rows = [of_sight for of_sight in of_sights if isinstance(of_sight, CachedRows)]
    assert len(rows) == len(of_sights), "a kernel reads rows from the cache"
    return rows[0].tables, rows[0].places_B, rows[0].positions_B, np.stack([one.first_keys_B for one in rows])


@dataclass(frozen=True)
class _Calculation:
    """What the kernels get of one step; see layer_kernels.py."""

    buffers: tuple[int, ...]
    angles: tuple[int, int]
    slots: Indices
    state: Indices


class _Proof:
    """Whether each of some layers gets what the one before put out, untouched, and all get the same angles."""

    def __init__(self, layers: list[Any]) -> None:
        self._left = list(reversed(layers))
        self._output: torch.Tensor | None = None
        self._as_put_out: torch.Tensor | None = None
        self._angles: object = None

    @property
    def is_complete(self) -> bool:
        """Whether that holds for all of them."""
        return not self._left

    def watch(self, layer: Any, hidden: torch.Tensor, angles: object, output: torch.Tensor) -> None:
        """One layer has computed; in the order of the model."""
        if self._output is None or self._as_put_out is None:
            self._angles, is_so = angles, angles is not None
        else:
            is_so = hidden is self._output and angles is self._angles and torch.equal(hidden, self._as_put_out)
        if self._left[-1:] == [layer] and is_so:
            self._left.pop()
        self._output, self._as_put_out = output, output.clone()


class LayerRun:
    """Neighbouring layers of one stage, of equal sizes."""

    def __init__(self, layers: list[Any], ends_model: bool) -> None:
        """`ends_model`: whether nothing but logits comes behind them."""
        self.layers = layers
        self._ends_model = ends_model
        self._output: torch.Tensor | None = None  # of all of them in this step
        self._known_group: object = None  # whose first step has shown, or shows, whether they may be joined
        self._proof: _Proof | None = None  # while it shows
        self._is_proven = False
        attention, out, down = layers[0].self_attn, layers[0].self_attn.o_proj.method, layers[0].mlp.down_proj.method
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        self._eps: float = norm_eps(layers[0].input_layernorm)
        self._hidden, self._inside, self._num_heads = out.num_outputs, down.num_inputs, out.num_inputs // self._head_dim
        self._group: PresentGroup = attention.o_proj.group
        self._attentions: list[LayerAttention] = []  # that the table is of
        self._space = torch.empty(0, dtype=DTYPE)

    def put_through(self, layer: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor | None:
        """The output of one of the layers: the first computes for all. None where it has to compute by itself."""
        if layer is self.layers[0]:
            if self._group.group is not self._known_group:  # a shard that is new has to prove in the same step
                self._known_group, self._is_proven, self._proof = self._group.group, False, _Proof(self.layers)
            self._output = self._all(hidden, *arguments["position_embeddings"]) if self._is_proven else None
        else:
            assert self._output is None or hidden is self._output, "something status between the layers"
        return self._output

    def prove(self, layer: Any, hidden: torch.Tensor, arguments: dict[str, Any], output: torch.Tensor) -> None:
        """Watch a layer that computed by itself: in the first step with a group, or never."""
        if self._proof is None:
            return
        self._proof.watch(layer, hidden, arguments.get("position_embeddings"), output)
        if layer is self.layers[-1]:
            self._is_proven, self._proof = self._proof.is_complete, None

    def _all(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
        attentions = [getattr(layer.self_attn, MODULE_ATTRIBUTE) for layer in self.layers]
        step, num_tokens = attentions[0].current.attention, hidden.shape[1]
        can_use_kernel = hidden.dtype == cos.dtype == DTYPE and cos.shape == (1, num_tokens, self._head_dim)
        group = self._group.group
        if (
            not can_use_kernel
            or step is None
            or step.rows is not None
            or not isinstance(group, LoneShard | SharedMemoryStage)
        ):
            return None
        if attentions != self._attentions:
            self._tabulate(attentions)
        if not self._suits_cache:
            return None
        state, _memory = group.lend_state() if isinstance(group, SharedMemoryStage) else (alone(), None)
        x = hidden.clone(memory_format=torch.contiguous_format)
        buffers = (x.data_ptr(), *self._buffers(num_tokens))
        cos, sin = cos.contiguous(), sin.contiguous()
        spent_ns, norm, size = state[SPENT_NS], self._table[0, layer_kernels.NORM], self._hidden
        rms_norm(buffers[0], norm, buffers[1], num_tokens, size, size, size, self._eps, DTYPE_TAGS[DTYPE])
        calculation = _Calculation(buffers, (cos.data_ptr(), sin.data_ptr()), step.slots_T.numpy(), state)
        status = self._compute(step, calculation, x[0])
        self._group.add_seconds(float(state[SPENT_NS] - spent_ns) / 1e9)
        if isinstance(group, SharedMemoryStage):
            group.check(status)
        return x

    def _compute(self, step: StepAttention, of: "_Calculation", x_TH: torch.Tensor) -> Any:
        """All layers; the last one of a model goes on only with those tokens that are asked for."""
        asked = step.asked if self._ends_model else None
        last, num_layers = len(self.layers) - 1, len(self.layers)
        status = self._run(step, of, 0, num_layers if asked is None else last)
        if asked is None or status != OK:
            return status
        self._call(of, last, PROJECT, _NO_ROWS)
        if not len(asked.rows_Q):
            return OK
        x_QH, query_QhD = x_TH[asked.rows_Q], self._query_ThD[asked.rows_Q]
        _, normed, product, _, *others = of.buffers
        compact = replace(of, buffers=(x_QH.data_ptr(), normed, product, query_QhD.data_ptr(), *others))
        rows = _rows_of([asked.by_mask[mask_spec] for mask_spec in self._sights])
        status = self._call(compact, last, ATTEND | FINISH, rows)
        x_TH[asked.rows_Q] = x_QH
        return status

    def _run(self, step: StepAttention, of: "_Calculation", first: int, end: int) -> Any:
        """Some layers for all tokens; torch computes the attention of steps with a prompt that is too long for ours."""
        of_sights = [step.by_mask[mask_spec] for mask_spec in self._sights]
        if not any(visibility.tiles for visibility in of_sights):
            rows = _rows_of([visibility.groups[0] for visibility in of_sights])
            return self._call(of, first, PROJECT | ATTEND | FINISH, rows, end)
        status, places = OK, np.zeros(len(of.slots), np.int64)
        for i in range(first, end):
            if status == OK:
                self._call(of, i, PROJECT, _NO_ROWS)
                self._attended_ThD[:] = self._attentions[i].attend_stored(
                    self._query_ThD.transpose(0, 1), self._scaling
                )
                status = self._call(of, i, FINISH, (_NO_ROWS[0], places, *_NO_ROWS[2:]))
        return status

    def _call(self, of: "_Calculation", first: int, parts: int, rows: _Rows, end: int | None = None) -> Any:
        which = first, first + 1 if end is None else end, parts
        numbers = self._sizes, self._eps, self._scaling
        return layer_kernels.run(self._table, *which, of.buffers, of.angles, of.slots, rows, *numbers, of.state)

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
        self._query_ThD, self._attended_ThD = (part.view(num_tokens, -1, self._head_dim) for part in parts[2:4])
        return [part.data_ptr() for part in parts]

    def _tabulate(self, attentions: list[LayerAttention]) -> None:
        """Write down where everything lies; the cache is another when it was allocated anew."""
        self._attentions = attentions
        self._suits_cache = all(attention.has_dot and attention.spec.softcap is None for attention in attentions)
        self._sights = sorted({attention.spec.mask_spec for attention in attentions}, key=repr)
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
        mask_spec = self._sights.index(attention.spec.mask_spec)
        return [norm, *qkv, out, mlp_norm, *gate_up, down, no_bias, keys, values, mask_spec]


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


def fuse_layers(layers: nn.ModuleList, has_head: bool) -> None:
    """Let neighbouring layers of a model that are all kernels run as one. All linear layers are packed; CPU only.

    `has_head`: whether the model's last layers are here.
    """
    run: list[Any] = []
    for layer in [*layers, None]:
        if run and (layer is None or not _suits(layer) or _sizes_of(layer) != _sizes_of(run[0])):
            _join(run, ends_model=has_head and layer is None)
            run = []
        if layer is not None and _suits(layer):
            run.append(layer)


def _join(layers: list[Any], ends_model: bool) -> None:
    run = LayerRun(layers, ends_model)
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
        and all(type(out) is RowwiseLinear and isinstance(out.method, PanelPackedLinear) for out in outs)
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
    heads = *attention.siblings.sizes, attention.head_dim, attention.scaling
    return (*sizes, *heads, *map(norm_eps, norms))
