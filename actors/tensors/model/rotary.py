"""Fixes rotary embeddings whose frequencies would follow the longest sequence of a batch."""

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from actors.words.errors import UnsupportedModel

ROTARY_NAME = "apply_rotary_pos_emb"  # what Transformers' model files call it; all give (q, k, cos, sin)
_FOLLOWING = ("dynamic", "longrope")  # Transformers chooses their frequencies by the largest position that it is given


def fix_rotary(model: nn.Module, max_model_len: int) -> None:
    """Choose the frequencies once, for sequences of `max_model_len`: one long request must not change the others.

    Up to the length that the model was first trained on they are Transformers' own. Beyond it Transformers would use
    others for short prompts than for long ones; here all sequences use those for long ones.
    """
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, dict) and any(of_layers in _FOLLOWING for of_layers in kind.values()):
            raise UnsupportedModel(f"{type(model).__name__}: rope types {kind} of several layers follow the batch")
        if kind in _FOLLOWING:
            _fix(module, max_model_len)


def _fix(module: Any, max_model_len: int) -> None:
    original = module.config.rope_parameters.get("original_max_position_embeddings") or module.original_max_seq_len
    if max_model_len > original:
        device = module.inv_freq.device
        init = ROPE_INIT_FUNCTIONS[module.rope_type]
        module.inv_freq, module.attention_scaling = init(module.config, device, seq_len=max_model_len)
    module.rope_type = "default"
