"""The reference: plain Transformers, its weights in main memory; each layer visits the device for its computation.

None of the model's computation is ours. Batches have two rows with the same ids: in the first the model goes on by
itself, in the second every layer gets what the ranks' layer got. B rows · T tokens · Q logits rows · V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from actors.decisions.model.plan import Plan
from actors.tensors.backends.host_memory import available_bytes
from actors.tensors.model.config_reader import auto_class
from actors.tensors.model.rotary import depends_on_length
from actors.tensors.model.skeleton import read_model_config
from actors.tensors.weights.mapped import fetch_weights

BATCH = 2
ALONE, GUIDED = range(BATCH)  # the rows of a batch


class Call(NamedTuple):
    """One module's call."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Watcher(Protocol):
    """What looks on while the reference computes."""

    def begins(self, num_tokens: int) -> None:
        """A pass over so many tokens begins."""

    def enters(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What enters a layer [B, T, *] → what it shall get instead."""

    def leaves(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the last layer puts out [B, T, *] → what goes on instead."""

    def called(self, call: Call) -> None:
        """A module has been called, which may be among those inside a layer."""


class Reference:
    """Transformers' own model of a checkpoint."""

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        """Raises ValueError where main memory does not hold the model."""
        spec = plan.spec
        _check_memory(plan)
        only_eager = any(one.softcap is not None or one.has_sinks for one in spec.attentions)  # others drop them
        config = read_model_config(folder)
        fetch_weights(folder)
        self.model: Any
        self.model, info = auto_class(config).from_pretrained(
            str(folder),
            config=config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation="eager" if only_eager else None,
            trust_remote_code=False,
            output_loading_info=True,
        )
        self.model.eval()
        if unset := sorted(set(info["missing_keys"]) & {parameter.name for parameter in spec.parameters}):
            raise ValueError(
                f"model.source: Transformers itself does not find {unset[0]} in {folder} (and {len(unset) - 1} more), "
                "so that there is nothing to compare with; compare the checkpoint's files with their source"
            )
        self._spec = spec
        self._device = device
        self._max_model_len = plan.max_model_len
        self._depends_on_length = any(map(depends_on_length, self.model.modules()))
        self._is_exact = False
        self._visits: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for module, is_whole in self._visitors():
            module.register_forward_pre_hook(lambda module, args, is_whole=is_whole: self._arrive(module, is_whole))
            module.register_forward_hook(lambda module, args, output: self._depart(module), always_call=True)

    @torch.no_grad()
    def run(self, ids: Sequence[int], rows_Q: Sequence[int], watcher: Watcher, is_exact: bool) -> torch.Tensor:
        """Run the ids → logits [B, Q, V] of the tokens `rows_Q`. `is_exact`: in float32, from the same weights."""
        self._is_exact = is_exact
        positions = list(range(len(ids)))
        arguments: dict[str, Any] = {"use_cache": False, "logits_to_keep": self._tensor(rows_Q)}
        if self._depends_on_length:  # of the longest sequence in the batch, which for the ranks is always this one
            ids, positions = [*ids, 0], [*positions, self._max_model_len - 1]
            arguments["position_ids"] = self._tensor(positions).expand(BATCH, -1)
        watcher.begins(len(ids))
        with self._watched_by(watcher):
            logits: torch.Tensor = self.model(input_ids=self._tensor(ids).expand(BATCH, -1), **arguments).logits
        return logits

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self._device)

    def _visitors(self) -> list[tuple[nn.Module, bool]]:
        """The modules that visit the device, and whether with all that is inside: layers, and what is around them."""
        layers = self.model.get_submodule(self._spec.layers_name)
        inside = {module for layer in layers for module in layer.modules()}
        return [(layer, True) for layer in layers] + [
            (module, False)
            for module in self.model.modules()
            if module not in inside and (list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)))
        ]

    def _arrive(self, module: nn.Module, is_whole: bool) -> None:
        tensors = [*module.parameters(is_whole), *module.buffers(is_whole)]
        self._visits[module] = [(tensor, tensor.data) for tensor in tensors]
        for tensor in tensors:
            dtype = torch.float32 if self._is_exact and tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(self._device, dtype)

    def _depart(self, module: nn.Module) -> None:
        for tensor, at_home in self._visits.pop(module, []):
            tensor.data = at_home

    @contextmanager
    def _watched_by(self, watcher: Watcher) -> Iterator[None]:
        layers = self.model.get_submodule(self._spec.layers_name)
        hooks = [
            layer.register_forward_pre_hook(_on_entry(watcher, number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        hooks.append(layers[-1].register_forward_hook(_on_leaving(watcher)))
        for name, module in self.model.named_modules():
            if name:
                hooks.append(module.register_forward_hook(_on_call(watcher, name), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _on_entry(watcher: Watcher, layer: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (watcher.enters(layer, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": watcher.enters(layer, kwargs["hidden_states"])}

    return hook


def _on_leaving(watcher: Watcher) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (watcher.leaves(output[0]), *output[1:])
        return watcher.leaves(output)

    return hook


def _on_call(watcher: Watcher, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        watcher.called(Call(name, module, args, kwargs, output))

    return hook


def _check_memory(plan: Plan) -> None:
    spec = plan.spec
    needed, free = sum(parameter.numel for parameter in spec.parameters) * spec.dtype_bytes, available_bytes()
    if needed > free:
        raise ValueError(
            f"Transformers' own model takes {needed / 1e9:.1f} GB of main memory on the node of the first stage, where "
            f"{free / 1e9:.1f} GB are free; choose a node with more by placement.label_selector"
        )
