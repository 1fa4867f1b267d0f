"""Writes support.md and prints what `TESTED` must name: every family and published shape, served on this machine.

Run it when Transformers is updated or a family is added: `python tests/families/support.py`, some minutes. With names
of families or published configs it tries these alone. The tests hold support.md and `TESTED` against what they see.
"""

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from outcome import SETTINGS, Outcome, outcome_of, outcome_of_published  # noqa: E402
from shrunk import NAMES, families_of  # noqa: E402

SUPPORT = Path(__file__).with_name("support.md")

INTRODUCTION = f"""# Families

Every causal family of Transformers {transformers.__version__} that has a tensor-parallel plan, Transformers' or ours.
*tiny*: a random checkpoint with no setting left neutral. *published*: the shape of a checkpoint that people have, see
below. Right is: fp32 logits within 1e-4 of Transformers' own, and equal greedy ids, with several requests in one batch,
and no large matrix that every shard holds whole. Multi-modal checkpoints are served for text alone.
Written by `python tests/families/support.py`, and held against what `pytest -m soak tests/families` sees.
"""
HEADING = "## Published shapes"
OF_PUBLISHED = f"""
{HEADING}

The configs in [tests/data](../data/published) (and `more_published.json` there), without their quantization: planned at
their real size, and a tiny random checkpoint of the same shape compared as above: every switch as published, sizes
smaller, as many layers as have every kind. Checkpoints that are quantized are refused.
"""


def tables(families: dict[str, Outcome], published: dict[str, Outcome]) -> str:
    """Markdown."""
    has_shape = {
        family for name, outcome in published.items() if outcome.kind == "right" for family in families_of(name)
    }
    tried = {name: "tiny, published" if name in has_shape else "tiny" for name in families}
    return "\n".join(
        [
            INTRODUCTION,
            *_table("family", "tried", families, tried),
            OF_PUBLISHED,
            *_table("config", "family", published, {name: families_of(name)[0] for name in published}),
            "",
        ]
    )


def _table(title: str, second: str, outcomes: dict[str, Outcome], seconds: dict[str, str]) -> Iterator[str]:
    counts = Counter(outcome.kind for outcome in outcomes.values())
    yield f"{counts['right']} right, {counts['refused']} refused, {counts['wrong']} wrong."
    yield ""
    yield _row(title, second, "architecture", "layouts (TP×PP)", "styles of its layers, or why it is refused")
    yield "|---|---|---|---|---|"
    for name, one in sorted(outcomes.items()):
        layouts = ", ".join(f"{tp}×{pp}" for tp, pp in one.layouts)
        yield _row(name, seconds[name], one.architecture, layouts, one.styles or f"{one.kind}: {one.reason}")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def read() -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """What support.md says of families and of published shapes."""
    families, published = SUPPORT.read_text().split(HEADING)
    return _read_table(families), _read_table(published)


def _read_table(text: str) -> dict[str, Outcome]:
    found = {}
    for line in [line for line in text.splitlines() if line.startswith("| ")][1:]:
        name, _, architecture, layouts, last = line.removeprefix("| ").removesuffix(" |").split(" | ", 4)
        kind, colon, reason = last.partition(": ")
        sizes = tuple((int(tp), int(pp)) for tp, _, pp in (one.partition("×") for one in layouts.split(", ") if one))
        found[name] = (
            Outcome(kind, architecture, reason=reason) if colon else Outcome("right", architecture, sizes, styles=last)
        )
    return found


def main(asked: Iterable[str]) -> None:
    """All that is asked for, one after the other."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    families, published = read() if asked else ({}, {})
    for name in asked or (*sorted(SETTINGS), *NAMES):
        with tempfile.TemporaryDirectory() as folder:
            if name in SETTINGS:
                outcome = families[name] = outcome_of(name, Path(folder))
            else:
                outcome = published[name] = outcome_of_published(name, Path(folder))
        print(name, outcome.kind, outcome.architecture, outcome.reason, flush=True)
    SUPPORT.write_text(tables(families, published))
    right = [outcome for outcome in (*families.values(), *published.values()) if outcome.kind == "right"]
    print("TESTED:", sorted({outcome.architecture for outcome in right}))


if __name__ == "__main__":
    main(sys.argv[1:])
