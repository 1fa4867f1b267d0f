"""Reads a checkpoint's config into a ModelSpec: the probe's trace of the model, its tensors and its styles."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from actors.decisions.model.families import TESTED, amended_styles
from actors.decisions.model.spec import DTYPES, AttentionSpec, LayerSpec, ModelSpec, Parameter, Place, pattern_of
from actors.tensors.model.config_reader import ConfigReading, causal_class_name, in_short, read_config_json
from actors.tensors.model.probe import PROBE_NAME, Probe, Trace, on_fake_tensors, register_probe, same_inputs
from actors.tensors.model.rotary import fix_rotary
from actors.tensors.model.skeleton import build_model, config_digest, parameters_on_meta
from actors.tensors.weights.safetensors_index import stored_dtype
from actors.tensors.weights.source import revision_of
from actors.words.errors import CheckpointError, UnsupportedModel

logger = logging.getLogger(__name__)


def read_spec(folder: Path, dtype: str = "auto", only_tested: bool = True) -> ModelSpec:
    """The ModelSpec of a checkpoint folder. `dtype` is config.model.dtype; "auto" takes the checkpoint's own.

    Raises UnsupportedModel with a line for each reason why the checkpoint cannot be served, or ValueError. A family
    that is not in TESTED is refused, unless `only_tested` is False, as in the tests that show a family to be right.
    """
    reading = read_config_json(folder)
    reasons, notes = list(reading.reasons), list(reading.notes)
    try:
        resolved, where = resolve_dtype(reading, folder, dtype)
    except ValueError as error:
        if not reasons:
            raise
        reasons.append(str(error))
        resolved, where = DTYPES[0], ""
    if where:
        notes.append(where)
    spec = None
    if reading.config is not None:
        try:
            spec = _read(reading.config, resolved, config_digest(folder))
        except UnsupportedModel as error:
            reasons.append(str(error))
    if spec is not None and only_tested:
        reasons += _untested(spec)
    if reasons or spec is None:
        raise UnsupportedModel("\n".join(reasons))
    notes += _left_out(spec)
    for note in notes:
        logger.info("%s: %s", folder.name, note)
    return replace(spec, notes=tuple(notes), revision=revision_of(folder))


def resolve_dtype(reading: ConfigReading, folder: Path, asked: str) -> tuple[str, str]:
    """(One of DTYPES, where it was found if not in config.model.dtype nor at the top of config.json).

    Transformers' own order: config.json, the configs nested in it, the stored tensors; bfloat16 where all are silent.
    Raises ValueError for a dtype in which nothing is served.
    """
    dtype, where = asked, ""
    if asked == "auto" and reading.dtype is not None:
        dtype = reading.dtype
    elif asked == "auto":
        stored = _stored_dtype(folder, getattr(reading.config, "transformers_weights", None))
        dtype = stored or "bfloat16"
        where = f"config.json names no dtype; {dtype} is " + ("that of the stored tensors" if stored else "assumed")
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype: config.json says {dtype}; set model.dtype to one of {', '.join(DTYPES)}")
    return dtype, where


def _stored_dtype(folder: Path, named: str | None) -> str | None:
    """The dtype of the stored tensors; None where there are none yet, or loading will say what is wrong with them."""
    try:
        return stored_dtype(folder, named)
    except CheckpointError:
        return None


def _read(config: PretrainedConfig, dtype: str, digest: str) -> ModelSpec:
    """Build and probe a model. Raises UnsupportedModel."""
    register_probe()
    try:
        with parameters_on_meta():
            model = build_model(config, getattr(torch, dtype), PROBE_NAME, PROBE_NAME)
    except Exception as error:  # whatever a family's code raises for values that it does not expect
        if isinstance(error, ImportError):
            _refuse_text(config, dtype, digest)
        raise UnsupportedModel(
            f"{config.model_type}: Transformers cannot build it ({in_short(error)}); "
            + ("install what is missing" if isinstance(error, ImportError) else "mend the value in config.json")
        ) from error
    return _Reader(model, dtype, digest).read()


def _refuse_text(config: PretrainedConfig, dtype: str, digest: str) -> None:
    """Raises UnsupportedModel for what stands against a wrapper's text, where a part of it needs another package."""
    text = config.get_text_config(decoder=True)
    if text is not config and causal_class_name(text) is not None:
        _read(text, dtype, digest)


def _untested(spec: ModelSpec) -> list[str]:
    """A reason for each class, of the model and of its text, that nobody has shown to be served right."""
    return [
        f"{name} has not been shown to be served right, so it is not; tests/families/support.md has those that have"
        for name in (spec.architecture, spec.text_architecture)
        if name is not None and name not in TESTED
    ]


def _left_out(spec: ModelSpec) -> list[str]:
    """A sentence on the parts of a model that text does not need, such as an image encoder, if there are any."""
    used = {name[:at] for name in (one.name for one in spec.parameters) for at, dot in enumerate(name) if dot == "."}
    parts = set()
    for name in spec.unused:
        ends = [at for at, dot in enumerate(name) if dot == "."]
        parts.add(next((name[:end] for end in ends if name[:end] not in used), name))
    return [f"text alone is served, so these parts are left out: {', '.join(sorted(parts))}"] if parts else []


class _Reader:
    """One unsharded model, which is probed on fake tensors."""

    trace: Trace

    def __init__(self, model: PreTrainedModel, dtype: str, digest: str) -> None:
        self.model = model
        self.dtype = dtype
        self.digest = digest
        self.names = {id(module): name for name, module in model.named_modules()}
        self.config: Any = model.config.get_text_config(decoder=True)
        self.layers_name = self._largest_list()
        self.max_position: int = getattr(self.config, "max_position_embeddings", None) or 0

    def read(self) -> ModelSpec:
        """Probe the model, and put together what is known of it. Raises UnsupportedModel."""
        if not self.max_position:
            raise self._refusal("names no largest position (max_position_embeddings)")
        fix_rotary(self.model, self.max_position)  # on its real buffers
        with on_fake_tensors(self.model):
            self.trace = Probe(self.model, self.layers_name, self.max_position).run()
            return self._spec()

    def _spec(self) -> ModelSpec:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise self._refusal("has no plain embedding and head")
        embedding_name, head_name = self.names[id(embedding)], self.names[id(head)]
        if embedding.num_embeddings != head.out_features:
            raise self._refusal(f"embeds {embedding.num_embeddings} tokens, but its head knows {head.out_features}")
        tied = self._is_tied(embedding_name, head_name)
        return ModelSpec(
            architecture=type(self.model).__name__,
            text_architecture=None if self.config is self.model.config else causal_class_name(self.config),
            model_type=self.config.model_type,
            config_digest=self.digest,
            state_shape=self._only(self.trace.state_shapes, "shapes of hidden states"),
            hidden_size=embedding.embedding_dim,
            vocab_size=embedding.num_embeddings,
            max_position=self.max_position,
            dtype=self.dtype,
            layers=self._layers(),
            parameters=tuple(self._parameters(f"{head_name}.weight" if tied else None)),
            styles=self._styles(embedding_name, head_name),
            tied_head=tied,
            experts_per_token=self._experts_per_token(),
            grouped_experts=frozenset(pattern_of(self.names[id(module)]) for module in self.trace.grouped),
            unused=frozenset(name for name in self.model.state_dict() if self._place_of(name) is None),
            exchanges_more=self.trace.exchanges_more,
            layer_outputs=self._only(self.trace.layer_outputs, "kinds of layer outputs"),
            are_layers_chained=self.trace.are_chained,
            angles=self.trace.angles,
            same_inputs=same_inputs(self.trace),
            embedding_name=embedding_name,
            layers_name=self.layers_name,
            head_name=head_name,
        )

    def _styles(self, embedding_name: str, head_name: str) -> dict[str, str]:
        own = dict(self.model.tp_plan)
        return amended_styles(self.config.model_type, own, self.layers_name, embedding_name, head_name)

    def _experts_per_token(self) -> int | None:
        """Experts per token, for estimates only; families have many names for it."""
        names = (
            "num_experts_per_tok",
            "moe_topk",
            "moe_k",
            "num_experts_per_token",
            "top_k_experts",
            "experts_per_token",
        )
        found = [getattr(self.config, name, None) for name in names]
        counts = [max(count) if isinstance(count, list) else count for count in found if count]  # a list: by layer
        return next((count for count in counts if isinstance(count, int)), None)

    def _largest_list(self) -> str:
        """The name of the list of layers: of all module lists of the text's decoder the one with most parameters."""
        decoder = self.model.get_decoder()
        inside = self.names.get(id(decoder), "")
        sizes = {
            f"{inside}.{name}".removeprefix("."): sum(parameter.numel() for parameter in module.parameters())
            for name, module in decoder.named_modules()
            if isinstance(module, nn.ModuleList)
        }
        if not sizes:
            raise self._refusal("has no list of layers")
        return str(max(sizes, key=lambda name: sizes[name]))

    def _layers(self) -> tuple[LayerSpec, ...]:
        layers = self.model.get_submodule(self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        called = [name for name in self.trace.calls if name.startswith(self.layers_name + ".")]
        if called != [f"{self.layers_name}.{number}" for number in range(len(layers))]:
            raise self._refusal("does not run its layers once each, in order")
        attentions: list[list[AttentionSpec]] = [[] for _ in layers]
        for call in self.trace.attentions:
            name = self.names[id(call.module)]
            if not name.startswith(self.layers_name + "."):
                raise self._refusal(f"attends outside its layers, in {name}")
            layer = int(name.removeprefix(self.layers_name + ".").partition(".")[0])
            if any(known.name == name for known in attentions[layer]):
                raise self._refusal(f"attends twice in {name}")
            attentions[layer].append(
                AttentionSpec(
                    name,
                    call.num_heads,
                    call.num_kv_heads,
                    call.key_dim,
                    call.value_dim,
                    call.mask_spec,
                    call.softcap,
                    call.has_sinks,
                )
            )
        return tuple(LayerSpec(tuple(of_layer)) for of_layer in attentions)

    def _parameters(self, tied_head: str | None) -> list[Parameter]:
        """Everything that a checkpoint holds and the forward uses."""
        plan: dict[str, torch.dtype] = self.model._get_dtype_plan(getattr(torch, self.dtype))  # noqa: SLF001
        kept = {pattern: str(dtype).removeprefix("torch.") for pattern, dtype in plan.items()}
        found = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            place = self._place_of(name)
            if name == tied_head or place is None:
                continue
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tensor.is_floating_point():
                dtype = next((kept[pattern] for pattern in kept if pattern in name), dtype)
            found.append(Parameter(name, tuple(tensor.shape), dtype, place))
        return found

    def _place_of(self, name: str) -> Place | None:
        """Where a tensor is needed; None if no module that runs owns it."""
        if name.startswith(self.layers_name + "."):
            return "layer"
        owner = name.rpartition(".")[0]
        if owner in (self.model.base_model_prefix, ""):
            return "all"
        calls = self.trace.calls
        first, last = (calls.index(f"{self.layers_name}.{number}") for number in (0, self._num_layers() - 1))
        indices = [index for index, call in enumerate(calls) if call == owner]
        if not indices:
            return None
        if max(indices) < first:
            return "first"
        return "last" if min(indices) > last else "all"

    def _num_layers(self) -> int:
        layers = self.model.get_submodule(self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        return len(layers)

    def _is_tied(self, embedding_name: str, head_name: str) -> bool:
        ties = {frozenset(pair) for pair in self.model.all_tied_weights_keys.items()}
        of_head = frozenset({f"{head_name}.weight", f"{embedding_name}.weight"})
        if ties - {of_head}:
            names = ", ".join(sorted(name for tie in ties - {of_head} for name in tie))
            raise self._refusal(f"ties {names}; only head and embedding may share a weight")
        return of_head in ties

    def _only(self, kinds: set[Any], what: str) -> Any:
        if len(kinds) != 1:
            raise self._refusal(f"has several {what} ({', '.join(map(str, sorted(kinds)))})")
        return next(iter(kinds))

    def _refusal(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{type(self.model).__name__} {what}; it cannot be cut into stages and shards")
