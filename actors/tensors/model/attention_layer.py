"""Connects a model's attention modules to ours: the function that Transformers calls for attention."""

from typing import Any

import torch
from torch import nn

from actors.tensors.attention.metadata import AttentionMetadata, LayerCache
from actors.tensors.backend import AttentionBackend

ATTENTION_NAME = "stagemesh"  # free of the substrings that Transformers dispatches on (flash, sdpa, paged|, /)
_ATTRIBUTE = "stagemesh_layer"  # where a model's attention module carries its LayerAttention


class CurrentStep:
    """Holds the metadata of the step that is running; one object, shared by all layers of a rank."""

    def __init__(self) -> None:
        self._metadata: AttentionMetadata | None = None

    @property
    def metadata(self) -> AttentionMetadata:
        """The attention metadata of the running step."""
        assert self._metadata is not None, "no step is running"
        return self._metadata

    def begin(self, metadata: AttentionMetadata) -> None:
        """Set the metadata of the step that begins."""
        self._metadata = metadata

    def end(self) -> None:
        """Forget the step that has ended."""
        self._metadata = None


class LayerAttention:
    """One attention of the model: its part of the cache, its backend, and the running step."""

    def __init__(self, cache: LayerCache, backend: AttentionBackend, current: CurrentStep) -> None:
        self.cache = cache
        self.spec = cache.spec
        self.current = current
        self._backend = backend

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [heads, T, D], key and value [H, T, D] of the step's tokens, sinks [heads] → [T, heads, value D]."""
        self._backend.write(self.cache, key, value, self.current.metadata)
        return self.attend_stored(query, scaling, sinks)

    def attend_stored(self, query: torch.Tensor, scaling: float, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Query [heads, T, D] over the cache, which holds the step's keys and values already → [T, heads, value D]."""
        return self._backend.attend(self.cache, query, self.current.metadata, scaling, sinks)

    def attach(self, module: nn.Module) -> None:
        """Make a model's attention module attend through this."""
        setattr(module, _ATTRIBUTE, self)


def attention_of(module: nn.Module) -> LayerAttention:
    """The LayerAttention that is attached to an attention module."""
    layer = getattr(module, _ATTRIBUTE)
    assert isinstance(layer, LayerAttention)
    return layer


def detach(module: nn.Module) -> None:
    """Remove the LayerAttention from an attention module, if it has one."""
    if hasattr(module, _ATTRIBUTE):
        delattr(module, _ATTRIBUTE)


def transformers_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query [1, heads, T, D], key and value [1, H, T, D] → ([1, T, heads, D], None).

    The step and the cache come from an attribute of the module, not through the model's arguments. A module that passes
    other arguments than the probe saw fails here.
    """
    layer = attention_of(module)
    assert attention_mask is None
    assert dropout == 0.0
    assert (softcap, s_aux is not None) == (layer.spec.softcap, layer.spec.has_sinks)
    if scaling is None:  # as Transformers' own functions take it
        scaling = query.shape[-1] ** -0.5
    return layer.attend(query[0], key[0], value[0], scaling, s_aux).unsqueeze(0), None
