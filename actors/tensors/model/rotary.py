"""Fixes rotary embeddings whose frequencies would depend on the longest sequence of a batch."""

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from actors.words.errors import UnsupportedModel

ROTARY_NAME = "apply_rotary_pos_emb"  # its name in Transformers' model files; called with (q, k, cos, sin)
_DEPENDENT = ("dynamic", "longrope")  # rope types whose frequencies Transformers chooses by the largest position


def fix_rotary(model: nn.Module, max_model_len: int) -> None:
    """Choose the frequencies once, for sequences of `max_model_len`: one long request must not change the others.

    Up to the length that the model was first trained on they are Transformers' own. Beyond it Transformers uses
    different frequencies for short and for long prompts; here all sequences use those for long ones.
    """
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, dict) and any(of_layers in _DEPENDENT for of_layers in kind.values()):
            raise UnsupportedModel(f"{type(model).__name__}: rope types {kind} of several layers depend on the batch")
        if depends_on_length(module):
            _fix(module, max_model_len)


def depends_on_length(module: nn.Module) -> bool:
    """Whether Transformers chooses the frequencies of a rotary embedding by the longest sequence of a batch."""
    return getattr(module, "rope_type", None) in _DEPENDENT


def _fix(module: Any, max_model_len: int) -> None:
    original = module.config.rope_parameters.get("original_max_position_embeddings") or module.original_max_seq_len
    if max_model_len > original:
        device = module.inv_freq.device
        init = ROPE_INIT_FUNCTIONS[module.rope_type]
        module.inv_freq, module.attention_scaling = init(module.config, device, seq_len=max_model_len)
    module.rope_type = "default"
