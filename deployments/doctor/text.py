"""`stagemesh doctor` for people: a table of findings, the worst first, and what to do about each."""

import textwrap
from collections.abc import Sequence

from deployments.doctor.findings import JUDGEMENTS, Finding, worst

_COLUMNS = 100


def as_text(findings: Sequence[Finding]) -> str:
    """The whole text. Findings that nodes share stand once."""
    lines = []
    for judgement in JUDGEMENTS:
        shown: dict[tuple[str, str, str], list[str]] = {}
        for finding in findings:
            if finding.judgement == judgement:
                shown.setdefault((finding.check, finding.found, finding.remedy), []).append(finding.where)
        for (check, found, remedy), where in shown.items():
            is_short = judgement == "ok" and len(where) > 1  # else each node is named, to be looked after
            places = f"{len(where)} nodes like {where[0]}" if is_short else ", ".join(where)
            lines += _wrapped(f"{judgement:<12} {check:<14} ", f"{places}: {found}")
            lines += _wrapped(" " * 13 + "→ ", remedy) if remedy else []
    counts = ", ".join(
        f"{sum(finding.judgement == judgement for finding in findings)} {judgement}" for judgement in JUDGEMENTS
    )
    return "\n".join([*lines, "", f"Verdict: {worst(findings)} ({counts})"]) + "\n"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
