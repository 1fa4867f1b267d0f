"""Writes support.md and prints what `TESTED` must name: every family served on this machine, and what became of it.

Run it when Transformers is updated or a family is added: `python tests/families/support.py`, a few minutes. The tests
hold support.md and `TESTED` against what they see.
"""

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from outcome import LAYOUTS, SETTINGS, Outcome, outcome_of  # noqa: E402

SUPPORT = Path(__file__).with_name("support.md")


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown."""
    counts = Counter(outcome.kind for outcome in outcomes.values())
    lines = [
        "# Families",
        "",
        f"Every causal family of Transformers {transformers.__version__} that has a tensor-parallel plan, on a",
        "tiny random checkpoint with no setting left neutral: fp32 logits within 1e-4 of Transformers' own, and equal",
        "greedy ids, with several requests in one batch. Multi-modal checkpoints are served for text alone. Written by",
        "`python tests/families/support.py`, and held against what `pytest -m soak tests/families` sees.",
        "",
        f"{counts['right']} right, {counts['refused']} refused, {counts['wrong']} wrong.",
        "",
        "| family | architecture | layouts (TP×PP) | styles of its layers, or why it is refused |",
        "|---|---|---|---|",
    ]
    for model_type, outcome in sorted(outcomes.items()):
        layouts = ", ".join(f"{tp}×{pp}" for tp, pp in outcome.layouts)
        lines.append(
            row(model_type, outcome.architecture, layouts, outcome.styles or f"{outcome.kind}: {outcome.reason}")
        )
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    """Of the table."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """All families, one after the other."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = {}
    for model_type in sorted(SETTINGS):
        with tempfile.TemporaryDirectory() as folder:
            outcomes[model_type] = outcome_of(model_type, Path(folder), LAYOUTS)
        print(model_type, outcomes[model_type].kind, outcomes[model_type].reason, flush=True)
    SUPPORT.write_text(table(outcomes))
    print("TESTED:", sorted({outcome.architecture for outcome in outcomes.values() if outcome.kind == "right"}))


if __name__ == "__main__":
    main()
