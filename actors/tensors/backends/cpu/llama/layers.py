"""Runs of decoder layers of Llama's form on CPU, each in one kernel call, without Python between the products.

The modules of such a layer are substituted already (module_kernels.py, attention.py), and the probe has seen that
nothing happens between the layers. T tokens of the step · Q logits rows · H hidden size · h heads · D their dimension.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.decisions.model.spec import MaskSpec
from actors.tensors.attention.metadata import AttentionMetadata, CachedRows, DecodeGroup, LogitsRows
from actors.tensors.backend import RankModel
from actors.tensors.backends.cpu import paged_attention_avx512
from actors.tensors.backends.cpu.kernels import DTYPE_TAGS, CosSin, Rows, rms_norm
from actors.tensors.backends.cpu.linear import PanelPackedLinear
from actors.tensors.backends.cpu.llama import kernel
from actors.tensors.backends.cpu.llama.attention import KernelAttention
from actors.tensors.backends.cpu.llama.kernel import (
    ATTEND,
    DTYPE,
    FINISH,
    PROJECT,
    Buffers,
    Part,
    RowsByMask,
    Sizes,
    StepArrays,
)
from actors.tensors.backends.cpu.module_kernels import KernelGatedMLP, KernelRMSNorm
from actors.tensors.backends.trial import Account, Reason, difference, exchanging_nothing
from actors.tensors.backends.trial_steps import TrialSteps
from actors.tensors.model.attention_layer import LayerAttention, attention_of
from actors.tensors.model.parallel_layers import PassThrough, RowwiseLinear, norm_eps
from cluster.collectives.exchange import OK, SPENT_NS, alone
from cluster.collectives.interface import LoneShard, PresentGroup, StageGroup
from cluster.collectives.shared_memory import SharedMemoryStage

logger = logging.getLogger(__name__)

WHAT = "decoder_layer"  # the name of the substitution
_NONE = np.zeros(0, np.int64)
_NO_ROWS = RowsByMask(_NONE[None], _NONE, _NONE, _NONE[None])


def _rows_of(of_masks: Sequence[DecodeGroup | CachedRows]) -> RowsByMask:
    """The rows of a step, with the first keys by each mask; `of_masks` are the same rows."""
    rows = [of_mask for of_mask in of_masks if isinstance(of_mask, CachedRows)]
    assert len(rows) == len(of_masks), "the CPU backend plans CachedRows only"
    first_keys = np.stack([one.first_keys_B for one in rows])
    return RowsByMask(rows[0].tables, rows[0].table_of_B, rows[0].positions_B, first_keys)


class LayerRun(nn.Module):
    """Consecutive layers of one stage, of equal sizes. It replaces the first one; the others pass through."""

    def __init__(self, layers: Sequence[Any], ends_model: bool) -> None:
        """`ends_model`: whether only the logits rows are needed after these layers."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._layers = list(layers)  # the same, typed Any
        self._ends_model = ends_model
        first = layers[0]
        attention, out, down = first.self_attn, first.self_attn.o_proj.method, first.mlp.down_proj.method
        self._sizes = Sizes(
            hidden=out.num_outputs,
            inner=down.num_inputs,
            num_heads=out.num_inputs // attention.head_dim,
            num_kv_heads=(sum(attention.merged.sizes) - out.num_inputs) // (2 * attention.head_dim),
            head_dim=attention.head_dim,
            block_size=0,  # until the cache is allocated
            eps=norm_eps(first.input_layernorm),
            scaling=attention.scaling,
        )
        self._group: PresentGroup = attention.o_proj.group
        self._attentions: list[LayerAttention] = []  # for which the table of layers was made
        self._masks: list[MaskSpec] = []
        self._space = torch.empty(0, dtype=DTYPE)
        self._unfit: StageGroup | None = None  # the group through which kernels cannot exchange, as was logged

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[1, T, H] → [1, T, H]."""
        group = self._group.group
        if why_no_exchange(group) is None:
            return self._run(hidden_states, group, *kwargs["position_embeddings"])
        if group is not self._unfit:
            logger.warning("%s is not used in this epoch: %s", WHAT, why_no_exchange(group))
            self._unfit = group
        for layer in self.layers:
            hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states

    def _run(self, hidden: torch.Tensor, group: StageGroup, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        attentions = [attention_of(layer.self_attn) for layer in self._layers]
        num_tokens, size = hidden.shape[1], self._sizes.hidden
        assert hidden.dtype == cos.dtype == DTYPE, "the dtypes are not those that the probe saw"
        if attentions != self._attentions:
            self._tabulate(attentions)
        state, _memory = group.lend_state() if isinstance(group, SharedMemoryStage) else (alone(), None)
        x = hidden.clone(memory_format=torch.contiguous_format)
        cos, sin = cos.contiguous(), sin.contiguous()
        metadata = attentions[0].current.metadata
        buffers = self._lay_out(x.data_ptr(), num_tokens)
        step = StepArrays(buffers, CosSin(cos.data_ptr(), sin.data_ptr()), metadata.slots_T.numpy())
        spent_ns, norm = state[SPENT_NS], self._table[0, kernel.NORM]
        normed, tag = Rows(buffers.normed, size), DTYPE_TAGS[DTYPE]
        rms_norm(Rows(buffers.hidden, size), norm, normed, num_tokens, size, self._sizes.eps, True, tag)
        status = self._all_layers(metadata, step, x[0], state)
        self._group.add_seconds(float(state[SPENT_NS] - spent_ns) / 1e9)
        if isinstance(group, SharedMemoryStage):
            group.check(status)
        return x

    def _all_layers(self, metadata: AttentionMetadata, step: StepArrays, x_TH: torch.Tensor, state: Any) -> Any:
        """Run all layers; the last one of a model finishes only the logits rows."""
        wanted = metadata.logits_rows if self._ends_model else None
        num_layers = len(self.layers)
        status = self._some_layers(metadata, step, 0, num_layers if wanted is None else num_layers - 1, state)
        if wanted is None or status != OK:
            return status
        return self._last_layer(wanted, step, x_TH, state)

    def _last_layer(self, wanted: LogitsRows, step: StepArrays, x_TH: torch.Tensor, state: Any) -> Any:
        last = len(self.layers) - 1
        self._call(Part(last, last + 1, PROJECT), step, _NO_ROWS, state)
        if not len(wanted.rows_Q):
            return OK
        x_QH, query_QhD = x_TH[wanted.rows_Q], self._query_ThD[wanted.rows_Q]
        compact = step._replace(buffers=step.buffers._replace(hidden=x_QH.data_ptr(), query=query_QhD.data_ptr()))
        rows = _rows_of([wanted.by_mask[mask] for mask in self._masks])
        status = self._call(Part(last, last + 1, ATTEND | FINISH), compact, rows, state)
        x_TH[wanted.rows_Q] = x_QH
        return status

    def _some_layers(self, metadata: AttentionMetadata, step: StepArrays, first: int, end: int, state: Any) -> Any:
        """Run some layers for all tokens; if a prompt is too long for the kernel, torch computes the attention."""
        of_masks = [metadata.by_mask[mask] for mask in self._masks]
        if not any(visible.tiles for visible in of_masks):
            rows = _rows_of([visible.groups[0] for visible in of_masks])
            return self._call(Part(first, end, PROJECT | ATTEND | FINISH), step, rows, state)
        status, no_index = OK, np.zeros(len(step.slots), np.int64)
        rows = RowsByMask(_NO_ROWS.tables, no_index, no_index, _NO_ROWS.first_keys)  # only their number counts
        for i in range(first, end):
            if status == OK:
                self._call(Part(i, i + 1, PROJECT), step, _NO_ROWS, state)
                query_hTD = self._query_ThD.transpose(0, 1)
                self._attended_ThD[:] = self._attentions[i].attend_stored(query_hTD, self._sizes.scaling)
                status = self._call(Part(i, i + 1, FINISH), step, rows, state)
        return status

    def _call(self, part: Part, step: StepArrays, rows: RowsByMask, state: Any) -> Any:
        return kernel.run(self._table, part, step, rows, self._sizes, state)

    def _lay_out(self, hidden: int, num_tokens: int) -> Buffers:
        """Lay out the activations in one buffer, which is kept for steps of as many tokens or fewer."""
        sizes = self._sizes
        queries = sizes.num_heads * sizes.head_dim
        product = queries + 2 * sizes.num_kv_heads * sizes.head_dim
        widths = (sizes.hidden, product, queries, queries, 2 * sizes.inner, sizes.inner)
        if self._space.numel() < num_tokens * sum(widths):
            self._space = torch.empty(num_tokens * sum(widths), dtype=DTYPE)
        parts = torch.split(self._space[: num_tokens * sum(widths)], [num_tokens * width for width in widths])
        self._query_ThD, self._attended_ThD = (part.view(num_tokens, -1, sizes.head_dim) for part in parts[2:4])
        return Buffers(hidden, *(part.data_ptr() for part in parts))

    def _tabulate(self, attentions: list[LayerAttention]) -> None:
        """Make the table of layers; the addresses of the cache change when it is allocated again."""
        self._attentions = attentions
        self._masks = sorted({attention.spec.mask_spec for attention in attentions}, key=repr)
        self._sizes = self._sizes._replace(block_size=attentions[0].cache.keys_NbHD.shape[1])
        rows = [self._row(layer, attention) for layer, attention in zip(self.layers, attentions, strict=True)]
        self._table = np.array(rows)

    def _row(self, layer: Any, attention: LayerAttention) -> list[int]:
        """A row of the table of layers; its columns are kernel.NORM, kernel.QKV and so on."""
        qkv, gate_up = (merged.method.addresses(merged.bias) for merged in (layer.self_attn.merged, layer.mlp.merged))
        (out, no_bias), (down, _) = layer.self_attn.o_proj.method.addresses(), layer.mlp.down_proj.method.addresses()
        norm, mlp_norm = layer.input_layernorm.weight.data_ptr(), layer.post_attention_layernorm.weight.data_ptr()
        keys, values = attention.cache.keys_NbHD.data_ptr(), attention.cache.values_NbHD.data_ptr()
        mask = self._masks.index(attention.spec.mask_spec)
        return [norm, *qkv, out, mlp_norm, *gate_up, down, no_bias, keys, values, mask]


def why_no_exchange(group: StageGroup) -> str | None:
    """Why a kernel cannot sum over the shards of a group; None: it can."""
    if isinstance(group, LoneShard | SharedMemoryStage):
        return None
    return f"the shards exchange through {type(group).__name__}, not through shared memory"


def substitute(model: RankModel, trials: dict[str, TrialSteps], account: Account) -> None:
    """Substitute runs of consecutive layers by a LayerRun each. The modules of the layers are substituted already.

    `trials`: by the name of the attention.
    """
    layers = model.module.get_submodule(model.spec.layers_name)
    assert isinstance(layers, nn.ModuleList)
    first, end = model.shard.layers
    reasons = {index: _why_not(model, layers[index], trials) for index in range(first, end)}
    for reason in reasons.values():
        account.put(WHAT, reason)
    for run in _runs(layers, [index for index in range(first, end) if reasons[index] is None]):
        ends_model = model.shard.has_head and run[-1] == end - 1
        whole = LayerRun([layers[index] for index in run], ends_model)
        for index in run:
            layers[index] = PassThrough()
        layers[run[0]] = whole


def _runs(layers: nn.ModuleList, indices: list[int]) -> Iterator[list[int]]:
    """Runs of consecutive indices whose layers have equal sizes."""
    keys = [(index - i, _sizes_of(layers[index])) for i, index in enumerate(indices)]
    for _, run in itertools.groupby(zip(indices, keys, strict=True), key=lambda pair: pair[1]):
        yield [index for index, _ in run]


def _sizes_of(layer: Any) -> tuple[object, ...]:
    """The sizes that all layers of a run must share."""
    attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    outs = attention.o_proj.method, layer.mlp.down_proj.method
    sizes = [size for out in outs for size in (out.num_inputs, out.num_outputs)]
    return (*sizes, *attention.merged.sizes, attention.head_dim, attention.scaling, *map(norm_eps, norms))


def _why_not(model: RankModel, layer: Any, trials: dict[str, TrialSteps]) -> Reason | None:
    """Why a layer is not part of a LayerRun; None: it is."""
    reason = _why_not_by_parts(model, layer)
    if reason is not None:
        return reason
    trial = next(trial for name, trial in trials.items() if model.module.get_submodule(name) is layer.self_attn)
    if trial.shard.spec.softcap is not None:
        return "its scores are capped"
    reason = paged_attention_avx512.why_not(trial.shard.spec, trial.dtype, trial.block_size)
    if reason is not None:
        return f"its attention is not computed by the AVX-512 kernel: {reason}"
    run = LayerRun([layer], ends_model=False)
    with exchanging_nothing(model.group), trial.attached_to(layer.self_attn):
        return difference(lambda: trial.run(layer), lambda: trial.run(run), lambda: trial.run(layer, is_nudged=True))


def _why_not_by_parts(model: RankModel, layer: Any) -> str | None:
    if not model.spec.are_layers_chained or model.spec.layer_outputs:
        return "the model does something between its layers"
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    if any(not isinstance(getattr(layer, name, None), nn.Module) for name in names):
        return f"a layer does not have the parts {', '.join(names)}"
    if type(layer.self_attn) is not KernelAttention or type(layer.mlp) is not KernelGatedMLP:
        return "its attention or its MLP is not computed by a kernel"
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if any(type(norm) is not KernelRMSNorm or norm.weight.dtype != DTYPE for norm in norms):
        return "its norms are not computed by a bfloat16 kernel"
    if not all(norm.rounds_first for norm in norms):
        return "its norms do not round before their weights"
    if norm_eps(norms[0]) != norm_eps(norms[1]):
        return "its norms have different epsilons"
    outs: list[Any] = [layer.self_attn.o_proj, layer.mlp.down_proj]
    if any(out.bias is not None for out in outs):
        return "o_proj or down_proj has a bias"
    merged = layer.self_attn.merged.method, layer.mlp.merged.method
    if not all(isinstance(method, PanelPackedLinear) for method in (*merged, *(out.method for out in outs))):
        return "its weights are not panel-packed"
    if any(type(out) is not RowwiseLinear for out in outs):
        return "its outputs are not summed over the shards by a plain row-wise layer"
    return why_no_exchange(model.group.group)
