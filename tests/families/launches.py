"""Counts the launches of a decoder layer in a decode step on CUDA, for each family that is served, without a GPU.

    TRITON_INTERPRET=1 python tests/families/launches.py             # all, into tests/data/launches.json: minutes
    TRITON_INTERPRET=1 python tests/families/launches.py llama glm4  # these alone

Tiny checkpoints run one step over static buffers on the CUDA backend, with kernels that Triton interprets. A launch is
an operator that is neither a view nor an allocation, or a kernel. The table in docs/gpu.md is made of that file.
"""

import json
import os
import sys
import tempfile
import warnings
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
COUNTED = ROOT / "tests" / "data" / "launches.json"
NONE = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "_reshape_alias", "detach", "lift_fresh"}
PARTS = ("decoder_layer", "attention_block", "gated_mlp", "rms_norm", "paged_attention")


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do: operators that are neither views nor allocations, and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name.removeprefix("aten::")
        if not operator.is_view and name not in NONE:
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))

    def of(self, work: Callable[[], Any]) -> Counter[str]:
        """Those of a piece of work."""
        from actors.tensors.backends.cuda import layer_kernels

        kernel = type(layer_kernels._gate)
        run = kernel.run

        def count(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts[kernel.fn.__name__] += 1
            with _disable_current_modes():  # what the interpreter itself does
                return run(kernel, *args, **kwargs)

        self.counts.clear()
        with mock.patch.object(kernel, "run", count), self, torch.inference_mode():
            work()
        return Counter(self.counts)


def of_family(family: str) -> dict[str, Any]:
    """Launches of a family's layers behind the first, and why parts of them stay the model's own."""
    from outcome import SETTINGS, config_of
    from tiny import make_config, make_model, save

    from actors.decisions.model.plan import make_plan
    from actors.tensors.backend import StepInputs
    from actors.tensors.backends.cuda import attention_trial
    from actors.tensors.backends.cuda.backend import CUDABackend
    from actors.tensors.model.spec_reader import read_spec
    from actors.tensors.runner import Runner
    from cluster.collectives.interface import LoneShard

    class Alone:
        stage = LoneShard()
        previous = next = feedback = None

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(make_model(make_config(family, SETTINGS[family])), folder)
        plan = make_plan(config_of(folder, 1, 1), read_spec(folder, only_tested=False))
        runner = Runner(plan, 0, Alone(), CUDABackend(torch.device("cpu")))
        # Whether attention is right has tests of its own, and takes an interpreter most of the time
        with mock.patch.object(attention_trial, "why_not", lambda *_: None):
            runner.load(folder)
    runner.allocate_cache(2 * plan.num_blocks_for_longest)
    module, counting, marks = runner.model.module, Launches(), []
    for index in range(*runner.shard.layers):
        layer = module.get_submodule(f"{plan.spec.layers_name}.{index}")
        layer.register_forward_pre_hook(lambda *_: marks.append(counting.counts.total()))
        layer.register_forward_hook(lambda *_: marks.append(counting.counts.total()))
    graphs = runner.graphs
    shape = next(shape for shape in graphs.buckets.shapes if shape.is_decode)
    graphs.fill(shape, StepInputs(array("q"), [], [], torch.zeros(0, 0, dtype=torch.int64), []))
    counting.of(graphs.run)
    layers = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    aside = {one.what: one.reason_not for one in runner.substitutions if one.what in PARTS and one.reason_not}
    return {"launches": sorted(set(layers[1:] or layers)), "aside": aside}


def served() -> list[str]:
    """The families that the support table calls right."""
    from support import read

    families, _ = read()
    return sorted(name for name, outcome in families.items() if outcome.kind == "right")


def main(asked: list[str]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1: it is read when a kernel is defined")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    counted = json.loads(COUNTED.read_text()) if asked and COUNTED.exists() else {}
    for family in asked or served():
        counted[family] = of_family(family)
        print(family, counted[family], flush=True)
        COUNTED.write_text(json.dumps(counted, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
