"""Fixes rotary embeddings whose frequencies would depend on the longest sequence of a batch."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from actors.words.errors import UnsupportedModel

ROTARY_NAME = "apply_rotary_pos_emb"  # its name in Transformers' model files; called with (q, k, cos, sin)
_DEPENDENT = ("dynamic", "longrope")  # rope types whose frequencies Transformers chooses by the largest position


def fix_rotary(model: nn.Module, max_model_len: int) -> None:
    """Choose the frequencies once, for sequences of `max_model_len`: one long request must not change the others.

    Up to the length that the model was first trained on they are Transformers' own. Beyond it Transformers uses
    different frequencies for short and for long prompts; here all sequences use those for long ones. Raises
    UnsupportedModel for embeddings that cannot be fixed so.
    """
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, dict) and any(of_layers in _DEPENDENT for of_layers in kind.values()):
            names = ", ".join(map(str, sorted(set(kind.values()))))
            raise UnsupportedModel(
                f"{type(model).__name__}: layers differ in their rope types ({names}), of which some depend on the "
                "longest sequence of the batch; use another model"
            )
        if depends_on_length(module):
            _fix(module, max_model_len)


def depends_on_length(module: nn.Module) -> bool:
    """Whether Transformers chooses the frequencies of a rotary embedding by the longest sequence of a batch."""
    return getattr(module, "rope_type", None) in _DEPENDENT


@torch.no_grad()
def _fix(module: Any, max_model_len: int) -> None:
    """Let Transformers choose for the longest sequence, and choose no more after that."""
    like, positions = torch.zeros(1, 2, 1), torch.tensor([[0, max_model_len - 1]])
    wanted = module(like, positions)
    module.rope_type = "default"
    if hasattr(module, "rope_init_fn"):  # as in Phi-3.5-MoE: its forward looks at positions itself, to scale its angles
        inv_freq, _ = module.rope_init_fn(module.config)
        scale = float(wanted[0][0, 0, 0])  # the cosine of the angle 0, scaled
        module.rope_init_fn = lambda config: (inv_freq, scale)
        module.config = SimpleNamespace(rope_parameters={**module.config.rope_parameters, "rope_type": "default"})
    if not all(map(torch.equal, module(like, positions), wanted)):
        raise UnsupportedModel(
            f"{type(module).__name__}: its angles depend on the longest sequence of the batch, in a way that cannot be "
            "fixed here; use another model"
        )
