"""The probe: one forward pass on fake tensors records a model's attention arguments and the order of its modules.

It shows how many heads each attention has, how far back its tokens see, where the layers are, and what runs before and
after them. Nothing is read from config keys, whose names and meaning differ from family to family. Fake tensors have no
memory, so that the largest models take a second.
"""

import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from actors.decisions.model.spec import Angles, MaskSpec, pattern_of
from actors.tensors.model.config_reader import in_short
from actors.tensors.model.descent import Descent
from actors.tensors.model.mask_reader import MaskFunction, read_mask
from actors.tensors.model.position_only_cache import ProbedCache
from actors.words.errors import UnsupportedModel

logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)  # it prints the traces of errors told in words

PROBE_NAME = "stagemesh_probe"  # of its attention implementation and its mask function
_NUM_TOKENS = 8

# Arguments of the attention function that do not change its result here.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "is_causal", "position_embeddings", "logits_to_keep"}
)

# What models keep from token to token beside keys and values, by parts of the names by which they ask a cache for it
_STATES = {
    "indexer": "keeps the keys of a sparse indexer",
    "conv": "keeps the states of recurrent or convolution layers",
    "recurrent": "keeps the states of recurrent layers",
    "linear": "keeps the states of linear attention",
}
_OTHER_STATES = "keeps more from token to token than keys and values"


@dataclass(frozen=True)
class AttentionCall:
    """The arguments with which one module called the attention function."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    mask_spec: MaskSpec
    softcap: float | None
    has_sinks: bool


@dataclass
class Trace:
    """The record of a pass, in the order of the calls."""

    attentions: list[AttentionCall] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # names of layers and of modules outside them that hold tensors
    state_shapes: set[tuple[int, ...]] = field(default_factory=set)  # of what enters the layers, for one token
    layer_outputs: set[int] = field(default_factory=set)  # lengths of the tuples that layers return, 0 for a tensor
    exchanges_more: bool = False  # whether a layer gets more than hidden states of what only earlier stages compute
    are_chained: bool = True  # each layer gets the unchanged output of the one before, and all get the same angles
    angles: Angles | None = None  # of the layers' rotary embeddings; None: there are none, or of different shapes
    linear_inputs: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)  # name, input and its version
    grouped: list[nn.Module] = field(default_factory=list)  # experts that are multiplied by torch's grouped product


class Probe:
    """Runs a model that is `on_fake_tensors`, and records the Trace."""

    def __init__(self, model: PreTrainedModel, layers_name: str, max_position: int) -> None:
        self.trace = Trace()
        self._model = model
        self._layers_name = layers_name
        self._max_position = max_position
        self._masks: list[tuple[torch.Tensor, MaskFunction]] = []  # all that the model made
        self._mask_specs: dict[MaskFunction, MaskSpec] = {}  # of those that an attention uses
        self._of_stages = Descent()  # tensors that are computed on some stages only
        self._output: tuple[torch.Tensor, int] | None = None  # of the layer before, and its version
        self._angles: tuple[torch.Tensor, ...] = ()  # that the first layer got

    def run(self) -> Trace:
        """Run the pass. Raises UnsupportedModel when it fails, or calls attention with unsupported arguments."""
        AttentionInterface.register(PROBE_NAME, self._attend)
        AttentionMaskInterface.register(PROBE_NAME, self._mask)
        ExpertsInterface.register(PROBE_NAME, self._experts)
        hooks = [hook for name, module in self._model.named_modules() for hook in self._hooks(name, module)]
        ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64)
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        arguments["position_ids"] = torch.arange(_NUM_TOKENS).unsqueeze(0)
        past = ProbedCache()
        try:
            with torch.no_grad(), self._of_stages:  # inference mode has no versions, which show changes in place
                self._model(input_ids=ids, past_key_values=past, **arguments)
        except UnsupportedModel:
            raise
        except Exception as error:
            self._refuse_state(past)
            raise UnsupportedModel(
                f"{type(self._model).__name__}: its forward cannot be followed on shapes alone ({in_short(error)})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self._refuse_state(past)
        return self.trace

    def _refuse_state(self, past: ProbedCache) -> None:
        if not past.wanted:
            return
        has_indexer = any(name.endswith(".indexer") for name, _ in self._model.named_modules())
        signs = [*past.wanted, *["indexer"] * has_indexer]
        what = next((words for part, words in _STATES.items() if any(part in sign for sign in signs)), _OTHER_STATES)
        raise UnsupportedModel(
            f"{type(self._model).__name__} {what} (its cache is asked for {', '.join(sorted(past.wanted))}), which is "
            "not built; use a model that keeps only keys and values"
        )

    def _hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        parent, _, last = name.rpartition(".")
        if parent == self._layers_name and last.isdigit():
            yield module.register_forward_pre_hook(self._entering(name), with_kwargs=True)
            yield module.register_forward_hook(self._left)
        elif isinstance(module, nn.Linear) and name.startswith(self._layers_name + "."):
            yield module.register_forward_pre_hook(self._multiplying(name))
        elif not name.startswith(self._layers_name + ".") and _holds_tensors(module):
            yield module.register_forward_pre_hook(lambda *_: self.trace.calls.append(name))
            if module.state_dict():  # only one stage has it, and stages after the first only its zeros
                yield module.register_forward_hook(lambda module, args, output: self._of_stages.begin(output))

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.trace.calls.append(name)
            state = args[0] if args else kwargs.get("hidden_states")
            assert isinstance(state, torch.Tensor), "no hidden states enter the layer"
            if tuple(state.shape[:2]) != (1, _NUM_TOKENS):
                shape = str(list(state.shape)).replace(f", {_NUM_TOKENS},", ", tokens,")
                raise UnsupportedModel(
                    f"{type(self._model).__name__} hands hidden states of shape {shape} from layer to layer; only "
                    "[1, tokens, ...] is built, so use another model"
                )
            self.trace.state_shapes.add(tuple(state.shape[2:]))
            if self._output is not None:
                self.trace.exchanges_more |= self._of_stages.reaches((args[1:], kwargs), beside=state)
            self._note_chain(state, kwargs.get("position_embeddings"))

        return enter

    def _note_chain(self, state: torch.Tensor, angles: Any) -> None:
        """Note whether this layer gets the unchanged output of the one before, and the same angles as the first one."""
        pair = tuple(angles) if isinstance(angles, tuple | list) else ()
        if self._output is None:
            self._angles = pair
            if len(pair) == 2 and pair[0].shape[:2] == pair[1].shape[:2] == (1, _NUM_TOKENS):
                self.trace.angles = Angles(pair[0].shape[-1], str(pair[0].dtype).removeprefix("torch."))
            return
        output, version = self._output
        has_same_angles = len(pair) == len(self._angles) and all(map(operator.is_, pair, self._angles))
        if [(one.shape, one.dtype) for one in pair] != [(one.shape, one.dtype) for one in self._angles]:
            self.trace.angles = None
        self.trace.are_chained &= state is output and state._version == version and has_same_angles  # noqa: SLF001

    def _multiplying(self, name: str) -> Callable[..., None]:
        def multiply(linear: nn.Module, args: tuple[Any, ...]) -> None:
            self.trace.linear_inputs.append((name, args[0], args[0]._version))  # noqa: SLF001

        return multiply

    def _left(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.trace.layer_outputs.add(len(output) if isinstance(output, tuple) else 0)
        state = output[0] if isinstance(output, tuple) else output
        self._output = state, state._version  # noqa: SLF001

    def _mask(self, q_length: int, kv_length: int, mask_function: MaskFunction, **kwargs: Any) -> torch.Tensor:
        """Transformers' mask interface: notes the mask function, and returns a tensor by which to recognize it."""
        mask = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool)
        self._masks.append((mask, mask_function))
        return mask

    def _mask_spec_of(self, mask: torch.Tensor | None, module: nn.Module) -> MaskSpec:
        function = next((function for made, function in self._masks if made is mask), None)
        if function is None:
            raise UnsupportedModel(f"{self._who(module)} makes a mask of its own, which is not supported")
        if function not in self._mask_specs:
            with unset_fake_temporarily():
                self._mask_specs[function] = read_mask(function, self._max_position)
        return self._mask_specs[function]

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Transformers' attention interface: query [1, heads, T, D], key and value [1, H, T, D]."""
        unknown = sorted(name for name, given in kwargs.items() if _has_effect(name, given))
        if unknown:
            raise UnsupportedModel(
                f"{self._who(module)} passes {', '.join(unknown)} to attention, which is not supported"
            )
        mask_spec = self._mask_spec_of(attention_mask, module)
        if sliding_window not in (None, mask_spec.window) and not _sees_all(
            sliding_window, self._max_position, mask_spec
        ):
            raise UnsupportedModel(
                f"{self._who(module)} asks for a window of {sliding_window}, its mask for {mask_spec.window}"
            )
        self.trace.attentions.append(
            AttentionCall(
                module,
                query.shape[1],
                key.shape[1],
                key.shape[3],
                value.shape[3],
                mask_spec,
                softcap,
                s_aux is not None,
            )
        )
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None

    def _experts(self, module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Transformers' experts interface; fake tensors cannot show which experts are chosen."""
        self.trace.grouped.append(module)
        return torch.empty_like(hidden_states)

    def _who(self, module: nn.Module) -> str:
        return f"{type(self._model).__name__}: {type(module).__name__}"


def same_inputs(trace: Trace) -> frozenset[tuple[str, ...]]:
    """Patterns of linear modules of one parent that get the same input, once each, in every layer that has them."""
    groups: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, tensor, version in trace.linear_inputs:
        groups[name.rpartition(".")[0], id(tensor), version].append(name)
    num_calls = Counter(name for name, _, _ in trace.linear_inputs)
    num_together: Counter[tuple[str, ...]] = Counter()  # number of layers in which they get one input
    for names in groups.values():
        if len(names) > 1 and all(num_calls[name] == 1 for name in names):
            num_together[tuple(map(pattern_of, names))] += 1
    num_layers = Counter(map(pattern_of, num_calls))  # number of layers in which a module is called
    return frozenset(
        patterns
        for patterns, count in num_together.items()
        if all(pattern.count("*") == 1 and num_layers[pattern] == count for pattern in patterns)
    )


def register_probe() -> None:
    """Make PROBE_NAME known, so that a model can be built with it."""
    AttentionInterface.register(PROBE_NAME, _unprobed)
    ExpertsInterface.register(PROBE_NAME, _unprobed)


@contextmanager
def on_fake_tensors(model: PreTrainedModel) -> Iterator[None]:
    """A context of fake tensors, with shapes and no memory; the model's parameters, on meta before, become such."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        known: dict[int, nn.Parameter] = {}  # tied ones stay one
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in known:
                    shape = torch.empty(parameter.shape, dtype=parameter.dtype)
                    known[id(parameter)] = nn.Parameter(shape, requires_grad=False)
                setattr(module, name, known[id(parameter)])
        yield


def _unprobed(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this model runs only through a Probe")


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def _sees_all(window: int, max_position: int, mask_spec: MaskSpec) -> bool:
    return mask_spec == MaskSpec() and window >= max_position


def _has_effect(name: str, given: Any) -> bool:
    return given is not None and name not in _HARMLESS and not name.startswith("output_")
