"""`stagemesh verify` for people: the VerifyReport as text of at most 100 columns."""

import textwrap

from actors.tensors.verify.findings import Difference, Findings
from deployments.verify.report import VerifyReport

_COLUMNS = 100
_SHOWN = 5  # layers that differ


def as_text(report: VerifyReport) -> str:
    """The whole text."""
    tp, pp, found = report.tensor_parallel_size, report.pipeline_parallel_size, report.as_served
    lines = [
        f"{report.model} ({report.architecture})",
        f"{tp} shards x {pp} stages on {report.device}, weights and cache in {report.dtype}, beside plain Transformers",
        (
            f"{report.prompts} prompts of {report.shortest_prompt} to {report.longest_prompt} tokens at once, "
            f"{report.new_tokens} tokens after each"
        ),
        "",
        f"  ids      {_ids(found)}",
        f"  logits   {_logits(found, report.dtype)}",
        f"  modules  {found.num_compared} inputs and outputs compared; {_layers(report)}",
        "",
        f"Verdict: {report.verdict}",
    ]
    if report.verdict != "right":
        lines += [*_places(report), "What to do", *(f"  - {one}" for one in report.remedy)]
    if report.not_exercised:
        lines += ["Not exercised", *(f"  - {one}" for one in report.not_exercised)]
    return "\n".join(wrapped for line in lines for wrapped in _wrapped(line)) + "\n"


def describe(difference: Difference) -> str:
    """Where it is, in one line."""
    layer = "" if difference.layer is None else f"layer {difference.layer}, "
    rank = "" if difference.rank is None else f" (rank {difference.rank})"
    return f"{layer}{difference.what}{rank}"


def _layers(report: VerifyReport) -> str:
    seen = report.as_served.layers_compared
    return f"{seen} of {report.num_layers} layers by themselves" + (
        ", others in runs" if seen < report.num_layers else ""
    )


def _ids(found: Findings) -> str:
    ids = found.ids
    parts = [f"{ids.equal} of {ids.total} as Transformers chooses them"]
    parts += [f"{ids.near_ties} near ties"] if ids.near_ties else []
    parts += [f"{ids.wrong} wrong"] if ids.wrong else []
    parts += [f"{ids.not_sampled} not the likeliest of their own logits"] if ids.not_sampled else []
    return ", ".join(parts)


def _logits(found: Findings, dtype: str) -> str:
    if found.own_distance is None:
        return f"{found.logits_distance:.1e} away; up to {found.logits_allowed:.0e} is rounding"
    return (
        f"{found.logits_distance:.2%} away from float32; Transformers' own in {dtype} are {found.own_distance:.2%}, "
        f"and up to {found.logits_allowed:.2%} is rounding"
    )


def _places(report: VerifyReport) -> list[str]:
    differences = report.findings.differences
    if not differences:
        return ["No module differs where it can be seen: only what is sampled, or steps that the device has captured."]
    first, others = differences[0], differences[1:]
    lines = [
        f"First difference: {describe(first)}",
        f"  {first.rows} of {first.of} tokens, by up to {first.distance:.2g}; {first.allowed:.1g} is rounding",
    ]
    if others:
        lines += [f"Also, in places that do not follow from it ({len(others)})"]
        lines += [f"  - {describe(one)}" for one in others[:_SHOWN]] + (["  - …"] if others[_SHOWN:] else [])
    return lines


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip(" -")))
    return textwrap.wrap(line, _COLUMNS, subsequent_indent=indent, break_on_hyphens=False) or [""]
