"""What becomes of a family here: right, refused, or wrong; shown on a tiny checkpoint against Transformers itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.decisions.model.plan import make_plan
from actors.decisions.model.spec import ModelSpec
from actors.tensors.model.skeleton import read_model_config
from actors.tensors.model.spec_reader import read_spec
from actors.words.errors import UnsupportedModel
from configs.config import Config

from shrunk import published, shrunk  # isort: skip - beside this file
from threads import ThreadGang, serve  # isort: skip
from tiny import load_model, make_config, make_model, read_config, save, write_config  # isort: skip

SETTINGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("settings.json").read_text())
LAYOUTS = ((2, 1), (1, 2), (2, 2))
PROMPT_LENGTHS = (1, 4, 11, 23)
NUM_NEW = 8
TOLERANCE = 1e-4  # of the largest logit
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Reference:
    """What Transformers itself says after a prompt, computed anew for every id, without any cache."""

    prompt: list[int]
    new_ids: list[int]
    logits: torch.Tensor  # [new, vocabulary]


@dataclass(frozen=True)
class Outcome:
    """Of one family."""

    kind: str  # right, refused or wrong
    architecture: str = ""
    layouts: tuple[tuple[int, int], ...] = ()  # (tensor-parallel size, pipeline-parallel size)
    styles: str = ""  # of its layers, where it is right
    reason: str = ""  # why it is refused, or what is wrong


def outcome_of(model_type: str, folder: Path, layouts: tuple[tuple[int, int], ...] = LAYOUTS) -> Outcome:
    """Make a checkpoint of a family, and serve it in every layout."""
    save(make_model(make_config(model_type, SETTINGS[model_type])), folder)
    return _served(folder, layouts)


def outcome_of_published(name: str, folder: Path, layouts: tuple[tuple[int, int], ...] = LAYOUTS) -> Outcome:
    """Plan a published config at its real size, make a tiny checkpoint of its shape, and serve it in every layout."""
    raw = published(name)
    write_config(raw, folder)
    try:
        spec = read_spec(folder, dtype="bfloat16", only_tested=False)
        make_plan(config_of(folder, 2, 1), spec)
    except UnsupportedModel as error:
        return _refused(error)
    small = shrunk(raw, read_model_config(folder), spec)
    write_config(small, folder)
    save(make_model(read_config(folder)), folder)
    write_config(small, folder)  # as it is published: saving spells some of it anew
    return _served(folder, layouts)


def _refused(error: UnsupportedModel) -> Outcome:
    return Outcome("refused", reason="; ".join(str(error).splitlines()))


def _served(folder: Path, layouts: tuple[tuple[int, int], ...]) -> Outcome:
    try:
        spec = read_spec(folder, only_tested=False)
    except UnsupportedModel as error:
        return _refused(error)
    references = [reference(folder, length) for length in PROMPT_LENGTHS]
    layouts = tuple(layout for layout in layouts if layout[1] == 1 or not spec.exchanges_more)
    for layout in layouts:
        wrong = serve_in(layout, folder, spec, references)
        if wrong:
            return Outcome("wrong", spec.architecture, reason=f"TP{layout[0]} PP{layout[1]}: {wrong}")
    styles = {style for pattern, style in spec.styles.items() if pattern.startswith(spec.layers_name)}
    return Outcome("right", spec.architecture, layouts, ", ".join(sorted(styles)))


def config_of(folder: Path, tp: int, pp: int, **parallel: Any) -> Config:
    """The config that serves a folder in a layout."""
    return Config.model_validate(
        {
            "model": {"source": str(folder), "max_model_len": 64},
            "parallel": {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, **parallel},
            "cache": {"block_size": 4},
        }
    )


def serve_in(
    layout: tuple[int, int], folder: Path, spec: ModelSpec, references: list[Reference], **parallel: Any
) -> str:
    """What is wrong with a layout; nothing when its logits and ids are Transformers' own."""
    plan = make_plan(config_of(folder, *layout, **parallel), spec)
    served = serve(ThreadGang(plan, folder, 80), [one.prompt for one in references], NUM_NEW)
    for expected, (ids, logits) in zip(references, served, strict=True):
        distance = float((logits - expected.logits).abs().max() / expected.logits.abs().max())
        if distance > TOLERANCE or ids != expected.new_ids:
            return f"logits differ by {distance:.1e}, ids are {ids}, not {expected.new_ids}"
    return ""


@torch.inference_mode()
def reference(folder: Path, length: int) -> Reference:
    """Of the first random prompt that is nowhere near a tie, which rounding would decide."""
    model = load_model(folder)
    num_ids = model.get_output_embeddings().out_features
    for seed in range(30):
        ids = torch.randint(num_ids, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = []
        for _ in range(NUM_NEW):
            rows.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(rows[-1].argmax()))
        best = torch.stack(rows).topk(2).values
        if (best[:, 0] - best[:, 1]).min() > NEAR_TIE * best.abs().max():
            return Reference(ids[:length], ids[length:], torch.stack(rows))
    raise AssertionError(f"no prompt of {length} ids is clear of ties")
