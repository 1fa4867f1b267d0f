"""Checkpoints that hold too much: of every family, what harms nobody is left out, and what may matter is named."""

import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from junk import add, harmful, harmless, rewrite, stored_in
from outcome import SETTINGS, make_config, make_model, reference, save, serve_in

from actors.decisions.model.plan import make_plan
from actors.tensors.model.skeleton import build_skeleton, read_model_config
from actors.tensors.model.spec_reader import read_spec
from actors.tensors.weights.checkpoint import find_sources
from actors.tensors.weights.conversion import Conversions
from actors.words.errors import CheckpointError, UnsupportedModel
from configs.config import Config

pytestmark = pytest.mark.timeout(300)

REPRESENTATIVE = ("gpt_neox", "mixtral")  # other names and buffers in the layers; experts that are stacked
ALL = [pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.soak) for name in sorted(SETTINGS)]


@pytest.mark.parametrize("family", ALL)
def test_what_is_too_much(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(1)
    save(make_model(make_config(family, SETTINGS[family])), tmp_path)
    try:
        spec = read_spec(tmp_path, only_tested=False)
    except UnsupportedModel:
        return  # the support table says so
    conversions = Conversions(build_skeleton(read_model_config(tmp_path), torch.float32))
    stored = stored_in(tmp_path)
    kinds = harmless(stored, spec, conversions)
    rewrite(tmp_path, stored)
    add(tmp_path, stored, {key: tensor for junk in kinds.values() for key, tensor in junk.items()})
    layout = (2, 1) if spec.exchanges_more else (2, 2)
    with caplog.at_level(logging.WARNING, "actors.tensors.weights"):
        assert not serve_in(layout, tmp_path, spec, [reference(tmp_path, 11)])
    assert sum("left out" in record.message for record in caplog.records) == 1
    plan = make_plan(Config.model_validate({"model": {"source": str(tmp_path)}}), spec)
    for kind, key in harmful(stored, spec, conversions).items():
        add(tmp_path, stored, {key: torch.ones(3)})
        with pytest.raises(CheckpointError, match=f"junk.safetensors holds {key}"):
            find_sources(tmp_path, spec, plan.shards[0], conversions)
            pytest.fail(kind)


def test_buffers_that_transformers_expects_nowhere_keep_their_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints of A.X K1 route without a correction of the scores; its class starts with zeros."""
    save(make_model(make_config("axk1", SETTINGS["axk1"])), tmp_path)
    rewrite(tmp_path, {key: tensor for key, tensor in stored_in(tmp_path).items() if "e_score_correction" not in key})
    with caplog.at_level(logging.WARNING, "actors.tensors.weights"):
        assert not serve_in((2, 2), tmp_path, read_spec(tmp_path), [reference(tmp_path, 11)])
    assert ["not stored" in record.message for record in caplog.records] == [True]
