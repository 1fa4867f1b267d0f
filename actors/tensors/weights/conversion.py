"""Finds which stored tensors make which tensor of the model, by Transformers' own conversions on lazy tensors.

Checkpoints have names and layouts of their own: one tensor an expert, projections fused or apart. How Transformers
converts them when it loads a whole model is recorded here, so that a rank reads only its own parts.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from actors.tensors.weights.lazy import Lazy, Leaf, NotLazyError
from actors.tensors.weights.safetensors_index import StoredTensor, in_short
from actors.words.errors import CheckpointError

# What Transformers' conversions raise for tensors that do not fit each other
_WRONG_TENSORS = (ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError, StopIteration)


@dataclass(frozen=True)
class ConversionGroup:
    """The stored tensors from which one conversion makes one or several tensors of the model."""

    first_target: str
    converter: WeightConverter | None  # None: the tensor is stored as it is
    stored: dict[str, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))  # by source pattern

    @property
    def keys(self) -> str:
        """The file and the first keys, for messages."""
        tensors = [tensor for of_pattern in self.stored.values() for tensor in of_pattern]
        return f"{tensors[0].file}: {in_short([tensor.key for tensor in tensors])}"

    def convert(self, tensors: Mapping[str, Sequence[Any]], model: Any) -> dict[str, Any]:
        """Apply Transformers' operations to tensors, real or lazy, by source pattern → the results by target name."""
        if self.converter is None:
            [[tensor]] = tensors.values()
            return {self.first_target: tensor}
        made: dict[str, Any] = {pattern: list(of_pattern) for pattern, of_pattern in tensors.items()}
        for operation in self.converter.operations:
            made = operation.convert(
                made,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.first_target,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        full_name = self.first_target.replace("*.", "0.")
        inside = next((pattern for pattern in made if pattern in full_name), None)
        if inside is not None:  # operations name their results by patterns: the rest of the name is the target's
            prefix, _, suffix = full_name.partition(inside)
            made = {prefix + pattern + suffix: value for pattern, value in made.items()}
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Computed:
    """A tensor whose conversion cannot be inverted: all its sources are read whole, and converted."""

    group: ConversionGroup
    name: str


class Leftover(NamedTuple):
    """A stored tensor that the model has no place for."""

    stored: StoredTensor
    name: str  # as the model would call it


class Structure:
    """The part of a model that conversions and the rule on leftovers read, kept when the model is pruned."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.state: dict[str, torch.Tensor] = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in model.state_dict().items()
        }
        self.computed = frozenset(name for name, _ in model.named_buffers()) - set(self.state)  # buffers never stored
        # Patterns of what checkpoints of this family hold beside the model; the attribute has no public name
        self.ignored = sorted(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001
        # Buffers that checkpoints of this family need not hold, with the values that the model starts with
        optional = model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001
        self.initial = {
            name: buffer.clone()
            for name, buffer in model.named_buffers()
            if name in self.state and any(re.search(pattern, name) for pattern in optional)
        }
        self._modules = frozenset(name for name, _ in model.named_modules())

    def owner(self, name: str) -> tuple[str, list[str]]:
        """The innermost module of the model on a tensor's path, and the rest of the path."""
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:end]) in self._modules:
                return ".".join(parts[:end]), parts[end:]
        return "", parts

    def get_parameter(self, name: str) -> torch.Tensor:
        """A tensor of the model, on meta."""
        return self.state[name]


class Conversions:
    """Transformers' conversions of a model's checkpoints; made from the whole skeleton."""

    def __init__(self, skeleton: PreTrainedModel) -> None:
        self.structure = Structure(skeleton)
        transforms = get_model_conversion_mapping(skeleton)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._prefix = skeleton.base_model_prefix

    def groups(self, tensors: Iterable[StoredTensor]) -> tuple[dict[str, ConversionGroup], list[Leftover]]:
        """The groups by first target, and the stored tensors that the model has no place for.

        Raises CheckpointError where two stored tensors would be the same one of the model.
        """
        groups: dict[str, ConversionGroup] = {}
        leftovers: list[Leftover] = []
        for stored in sorted(tensors, key=_stacking_order):
            target, pattern = self.target_of(stored.key)
            if target not in self.structure.state:
                leftovers.append(Leftover(stored, self._name_of(target)))
                continue
            converter = None if pattern is None else self._by_pattern[pattern]
            group = groups.setdefault(target, ConversionGroup(target, converter))
            before = group.stored[pattern or stored.key]
            if before and before[-1].key == stored.key:
                raise CheckpointError(
                    f"{before[-1].file} and {stored.file} both hold {stored.key}; one of them must go"
                )
            if group.converter is not converter or (converter is None and len(group.stored) > 1):
                both = f"{group.keys} and {stored.key}"
                raise CheckpointError(f"{both} are both stored for {target}; one of them must go")
            before.append(stored)
        return groups, leftovers

    def target_of(self, key: str) -> tuple[str, str | None]:
        """The (first) tensor of the model that a key is for, and the pattern of its converter."""
        state = self.structure.state
        target, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, state)
        if target not in state and key in state:  # Transformers' own rule: such a key is not renamed
            target, pattern = rename_source_key(key, [], [], self._prefix, state)
        return target, pattern

    def _name_of(self, target: str) -> str:
        """What the model would call a leftover: with or without the base model's prefix, as it leads further in.

        Transformers adds or takes off the prefix only where that makes the name of a tensor that the model has.
        """
        names = (target, f"{self._prefix}.{target}", target.removeprefix(f"{self._prefix}."))
        return min(names, key=lambda name: len(self.structure.owner(name)[1]))

    def sources(self, groups: Mapping[str, ConversionGroup], wanted: Collection[str]) -> dict[str, Lazy | Computed]:
        """The sources of the wanted tensors, by name; without those for which nothing is stored."""
        found: dict[str, Lazy | Computed] = {}
        for group in groups.values():
            if group.converter is None and group.first_target not in wanted:
                continue
            leaves = {pattern: [Leaf(one) for one in stored] for pattern, stored in group.stored.items()}
            try:
                made: dict[str, Any] = group.convert(leaves, self.structure)
            except NotLazyError:
                made = self._on_meta(group)
            except _WRONG_TENSORS as error:
                raise CheckpointError(f"{group.keys} do not make {group.first_target}: {error}") from error
            found |= {name: source for name, source in made.items() if name in wanted}
        return found

    def _on_meta(self, group: ConversionGroup) -> dict[str, Computed]:
        """The tensors that a conversion makes which cannot be inverted; it is tried on meta tensors."""
        empty = {
            pattern: [torch.empty(one.shape, dtype=one.dtype, device="meta") for one in stored]
            for pattern, stored in group.stored.items()
        }
        try:
            return {name: Computed(group, name) for name in group.convert(empty, self.structure)}
        except _WRONG_TENSORS as error:
            raise CheckpointError(f"{group.keys} do not make {group.first_target}: {error}") from error


def _stacking_order(stored: StoredTensor) -> Any:
    """Sorts tensors as Transformers does, which stacks experts in this order."""
    return dot_natural_key(stored.key)
