"""The CPU backend: packed products, and kernels for attention, norms, MLPs and whole decoder layers."""

from collections.abc import Sequence

import numpy as np
import torch

from actors.decisions.model.spec import AttentionSpec
from actors.tensors.backend import AttentionBackend, LinearMethod, RankModel
from actors.tensors.backends.cpu import linear, module_kernels
from actors.tensors.backends.cpu.attention import CPUAttention
from actors.tensors.backends.cpu.gumbel_argmax import gumbel_argmax
from actors.tensors.backends.cpu.kernels import DTYPE_TAGS
from actors.tensors.backends.cpu.llama import attention as attention_block
from actors.tensors.backends.cpu.llama import layers as decoder_layers
from actors.tensors.backends.forms import is_gated_mlp, uses_rotary
from actors.tensors.backends.reference import ReferenceBackend
from actors.tensors.backends.trial import Account, exchanging_nothing
from actors.tensors.backends.trial_steps import TrialSteps
from actors.tensors.model.parallel_layers import ParallelLinear, is_rms_norm
from actors.words.messages import Substitution


class CPUBackend(ReferenceBackend):
    """The CPUs of a node; see Backend."""

    def linear_method(self, weights: Sequence[torch.Tensor]) -> LinearMethod | None:
        """See Backend."""
        return linear.linear_method(weights)

    def attention(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> AttentionBackend:
        """See Backend."""
        return CPUAttention(specs, dtype, block_size, self.upload)

    @torch.inference_mode()
    def optimize(self, model: RankModel) -> list[Substitution]:
        """See Backend."""
        account, attention = Account(), model.attention
        assert isinstance(attention, CPUAttention), "a model attends through its device's backend"
        for module in model.module.modules():
            if isinstance(module, ParallelLinear):
                account.put("panel_packed_linear", linear.why_no_panels(module))
        shards = model.shard.attentions
        trials = {shard.spec.name: TrialSteps(model, shard, attention.block_size, self.device) for shard in shards}
        with exchanging_nothing(model.group):
            _substitute_modules(model, trials, account)
        decoder_layers.substitute(model, trials, account)
        return account.entries()

    def best_tokens(
        self, logits_RV: torch.Tensor, first_id: int, temperatures_R1: torch.Tensor | None, keys_R1: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Backend."""
        if logits_RV.dtype not in DTYPE_TAGS:
            return super().best_tokens(logits_RV, first_id, temperatures_R1, keys_R1)
        return gumbel_argmax(logits_RV, first_id, temperatures_R1, keys_R1)

    def forbid_tokens(
        self, logits_RV: torch.Tensor, rows: Sequence[int], allowed_GB: torch.Tensor, first_bit: int
    ) -> None:
        """See Backend. NumPy takes bits apart some twenty times as fast as torch does."""
        allowed_GV = np.unpackbits(allowed_GB.numpy(), axis=1, bitorder="little")
        forbidden_GV = torch.from_numpy(allowed_GV[:, first_bit : first_bit + logits_RV.shape[1]] == 0)
        self.forbid(logits_RV, rows, forbidden_GV)


def _substitute_modules(model: RankModel, trials: dict[str, TrialSteps], account: Account) -> None:
    """Substitute norms, gated MLPs, attention blocks, and the rotary function of attention modules that stay."""
    dtype: torch.dtype = getattr(torch, model.spec.dtype)
    for module in model.module.modules():
        if is_rms_norm(module):
            account.put("rms_norm", module_kernels.substitute_norm(module))
        elif is_gated_mlp(module):
            account.put("gated_mlp", module_kernels.substitute_mlp(module, model.spec.hidden_size, dtype))
    for name, trial in trials.items():
        module = model.module.get_submodule(name)
        is_done = account.put("attention_block", attention_block.substitute(module, trial))
        if not is_done and uses_rotary(module):
            angles, spec = trial.angles, trial.shard.spec
            dim = spec.key_dim if angles is None else angles.dim
            account.put("rotary", module_kernels.substitute_rotary(module, dim, dtype))
