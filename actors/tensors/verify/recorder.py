"""The recorder: hooks on one rank's model keep what its modules take in and put out, while it serves.

What enters a layer is kept of every token, so that plain Transformers can be given the same: then each layer is
compared by itself, and no rounding error of another layer hides its own. What is inside is kept of a few tokens.
T tokens of the step · n those that are kept.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.decisions.model.plan import Plan
from actors.decisions.model.spec import pattern_of
from actors.tensors.backend import Backend
from actors.tensors.launched import Launched
from actors.tensors.model.parallel_layers import NoEmbedding, PassThrough, RowwiseLinear, SplitInputRowwiseLinear
from actors.tensors.model.stage_model import StageModel
from actors.tensors.runner import Neighbors, Runner
from actors.tensors.sequence_table import StepTensors, in_token_order
from actors.tensors.verify.recording import LOGITS, Recording, Rows, Tap, by_token, tensors_in
from actors.tensors.weights.checkpoint import LoadReport, Progress
from actors.words.messages import StepBatch

Places = frozenset[tuple[int, int]]  # sequence, position

# Of each sequence: the tokens of which everything inside the layers is kept
_FIRST = 2
_LAST_OF_PROMPT = 2
_GENERATED = 4

_FIELDS = [field.name for field in fields(Rows)]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of the running step."""

    sequences: torch.Tensor  # int64 [T], on the host as the others
    positions: torch.Tensor
    kept: torch.Tensor  # indices of those of which everything is kept
    logits: torch.Tensor  # indices of those that are sampled from


class Recorder:
    """Keeps the rows of one rank's model."""

    def __init__(self, model: StageModel, places: Places) -> None:
        """`places`: further tokens of which everything is kept."""
        self._model = model
        self._places = places
        self._tokens: _Tokens | None = None  # None: nothing is kept
        self._has_entered = False  # whether the step has come to this rank's layers
        self._rows: dict[Tap, list[Rows]] = {}
        self._calls = Counter[str]()  # of each module in this step
        self._not_by_token = set[Tap]()  # what only looked so, as heads do in a step of as many tokens
        self._hook_layers()
        self._hook_others()

    @contextmanager
    def during(self, tokens: list[tuple[int, int, int]], logits_rows: list[int]) -> Iterator[None]:
        """Keep what a step computes; `tokens`: each one's sequence, position and length of the prompt."""
        kept = [index for index, token in enumerate(tokens) if self._is_kept(*token)]
        sequences, positions, _ = (torch.tensor(column) for column in zip(*tokens, strict=True))
        self._tokens = _Tokens(
            sequences, positions, torch.tensor(kept, dtype=torch.int64), torch.tensor(logits_rows, dtype=torch.int64)
        )
        self._has_entered = False
        self._calls.clear()
        try:
            yield
        finally:
            self._tokens = None

    def keep(self, tap: Tap, sequences: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
        """Keep rows [n, *]."""
        self._rows.setdefault(tap, []).append(Rows(sequences, positions, values.detach().to("cpu", copy=True)))

    def recording(self) -> Recording:
        """Everything that was kept; it is given away."""
        joined = {}
        for tap in list(self._rows):
            rows = self._rows.pop(tap)
            if tap not in self._not_by_token:
                joined[tap] = Rows(*(torch.cat([getattr(one, field) for one in rows]) for field in _FIELDS))
        return Recording(self._model.shard.rank, joined)

    def _is_kept(self, sequence: int, position: int, num_prompt: int) -> bool:
        is_near = num_prompt - _LAST_OF_PROMPT <= position < num_prompt + _GENERATED
        return position < _FIRST or is_near or (sequence, position) in self._places

    def _hook_layers(self) -> None:
        """Layers by what enters them, and what is inside those that are still the model's own modules."""
        spec, shard = self._model.spec, self._model.shard
        (first, end), modules = shard.layers, {}
        for layer in range(first, end):
            modules[layer] = self._model.module.get_submodule(f"{spec.layers_name}.{layer}")
        for layer, module in modules.items():
            name = f"{spec.layers_name}.{layer}"
            if isinstance(module, PassThrough):  # one module computes several layers: this one is among them
                continue
            module.register_forward_pre_hook(self._on_entry(Tap(name, "in")), with_kwargs=True)
            if not isinstance(modules.get(layer + 1), PassThrough):
                for inner_name, inner in module.named_modules(prefix=name):
                    if inner is not module:
                        self._hook(inner_name, inner, lambda: True)
        modules[end - 1].register_forward_hook(self._on_leaving(Tap(f"{spec.layers_name}.{end - 1}", "out")))

    def _hook_others(self) -> None:
        """What runs before the layers on the first stage and behind them on the last; angles on every stage."""
        spec, shard = self._model.spec, self._model.shard
        for name, module in self._model.module.named_modules():
            is_around = not name or f"{spec.layers_name}.".startswith(f"{name}.")
            is_absent = isinstance(module, PassThrough | NoEmbedding)
            if is_around or is_absent or name == spec.head_name or name.startswith(f"{spec.layers_name}."):
                continue
            if any("inv_freq" in buffer for buffer, _ in module.named_buffers(recurse=False)):
                self._hook(name, module, lambda: True)
            else:
                self._hook(name, module, lambda: shard.has_head if self._has_entered else shard.has_embedding)

    def _on_entry(self, tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._has_entered = True
            if self._tokens is not None and self._model.shard.shard == 0:  # the other shards get the same
                self._keep(tap, args[0] if args else kwargs["hidden_states"], None)

        return hook

    def _on_leaving(self, tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._tokens is not None and self._model.shard.shard == 0:
                # Behind the last layer a backend may have computed nothing but what the logits need
                rows = self._tokens.logits if self._model.shard.has_head else self._tokens.kept
                self._keep(tap, output[0] if isinstance(output, tuple) else output, rows)

        return hook

    def _hook(self, name: str, module: nn.Module, is_meant: Callable[[], bool]) -> None:
        has_summands = self._model.spec.styles.get(pattern_of(name)) == "moe_tp_experts"

        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tokens = self._tokens
            if tokens is None:
                return
            call, self._calls[name] = self._calls[name], self._calls[name] + 1
            if not is_meant():
                return
            if has_summands or isinstance(called, RowwiseLinear):
                self._keep_summands(Tap(name, "partial", call=call), called, args, kwargs)
            rows = tokens.kept
            if self._has_entered and self._model.shard.has_head and not name.startswith(self._model.spec.layers_name):
                rows = tokens.logits
            for leaf, tensor in tensors_in(output):
                self._keep(Tap(name, "out", leaf, call), tensor, rows)

        module.register_forward_hook(hook, with_kwargs=True)

    def _keep_summands(self, tap: Tap, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what goes in, and what this shard adds to the sum, which is computed once more without the sum."""
        tokens, chosen = self._tokens, list[torch.Tensor]()
        assert tokens is not None
        for leaf, tensor in tensors_in((args, kwargs)):
            # Which experts a token goes to is kept of every token: near a tie it is decided by rounding
            is_choice = not tensor.is_floating_point() and self._model.shard.shard == 0
            self._keep(tap._replace(side="in", leaf=leaf), tensor, None if is_choice else tokens.kept)
            rows = by_token(tensor, 1, len(tokens.positions))
            chosen += [] if rows is None else [rows[0, tokens.kept.to(tensor.device)]]
        if not len(tokens.kept) or len(chosen) != len(args) + len(kwargs):
            return
        self._tokens = None  # of the modules inside nothing is kept
        summand = self._summand(module, chosen[: len(args)], dict(zip(kwargs, chosen[len(args) :], strict=True)))
        self._tokens = tokens
        self.keep(tap, tokens.sequences[tokens.kept], tokens.positions[tokens.kept], summand)

    def _summand(self, module: Any, args: list[torch.Tensor], kwargs: dict[str, torch.Tensor]) -> torch.Tensor:
        if isinstance(module, SplitInputRowwiseLinear):
            args = [args[0][..., slice(*module.columns)]]
        if isinstance(module, RowwiseLinear):
            return module.multiply(args[0].contiguous(), None)
        summand: torch.Tensor = module.forward(*args, **kwargs)
        return summand

    def _keep(self, tap: Tap, tensor: torch.Tensor, indices: torch.Tensor | None) -> None:
        """Keep the rows `indices` of a module's tensor, or all; nothing where it holds none for each token."""
        tokens = self._tokens
        assert tokens is not None
        rows = by_token(tensor, 1, len(tokens.positions))
        if rows is None:
            self._not_by_token.add(tap)
        elif indices is None:
            self.keep(tap, tokens.sequences, tokens.positions, rows[0])
        elif len(indices):
            self.keep(tap, tokens.sequences[indices], tokens.positions[indices], rows[0, indices.to(rows.device)])


class RecordingRunner(Runner):
    """A Runner whose steps are recorded. Sequences have the numbers of the requests, in the order they were added."""

    def __init__(
        self, plan: Plan, rank: int, neighbors: Neighbors, backend: Backend, places: Places = frozenset()
    ) -> None:
        self._places = places
        self._step: StepBatch | None = None
        super().__init__(plan, rank, neighbors, backend)

    def load(self, folder: Path, progress: Progress | None = None, substitutes: bool = True) -> LoadReport:
        """See Runner."""
        report = super().load(folder, progress, substitutes)
        assert self.model is not None
        self.recorder = Recorder(self.model, self._places)
        return report

    def launch(self, step: StepBatch) -> Launched:
        """See Runner."""
        self._step = step
        return super().launch(step)

    def forward(self, tensors: StepTensors, state: torch.Tensor | None) -> torch.Tensor:
        """See Runner."""
        assert self._step is not None
        tokens = []
        for entry in in_token_order(self._step.entries):
            num_prompt = self.table.rows[entry.seq].num_prompt
            positions = range(entry.start, entry.start + max(1, len(entry.ids)))
            tokens += [(entry.seq, position, num_prompt) for position in positions]
        if self._step.step < 0:  # warming up
            return super().forward(tensors, state)
        with self.recorder.during(tokens, tensors.logits_rows_Q.tolist()):
            return super().forward(tensors, state)

    def _static_work(self, step: StepBatch) -> Any:
        """None for chunks of prompts: hooks see the layers of steps that run without graphs and static buffers."""
        is_decode = all(len(entry.ids) <= 1 for entry in step.entries)
        return super()._static_work(step) if is_decode else None

    def _sample(self, step: StepBatch, work: Any, logits_QV: torch.Tensor) -> Any:
        sampling = [entry for entry in step.entries if entry.sample]
        if sampling and step.step >= 0:
            sequences = torch.tensor([entry.seq for entry in sampling])
            positions = torch.tensor([entry.start + max(1, len(entry.ids)) - 1 for entry in sampling])
            self.recorder.keep(LOGITS, sequences, positions, logits_QV[: len(sampling)])
        return super()._sample(step, work, logits_QV)
