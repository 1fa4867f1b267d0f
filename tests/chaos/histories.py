"""Histories: what was asked, every line of the answer and when; and the checker that names all that is wrong in one.

The checker knows nothing of the server but OpenAI's formats. It compares with a golden answer: what the same request
got without faults. Pure: no network, no clock.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class History:
    """One request and all that came back. Times are monotonic seconds."""

    name: str  # equal names: the same request
    body: dict[str, Any]
    sent_at: float
    status: int = 0
    lines: list[tuple[float, str]] = field(default_factory=list)  # of a plain answer: one, its body
    ended_at: float | None = None  # when the connection was done
    lost: str = ""  # how the connection broke

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(frozen=True)
class Golden:
    """What a request gets without faults."""

    text: str
    tokens: tuple[str, ...] | None  # where log-probabilities were asked for
    finish_reason: str
    usage: tuple[int, int]  # prompt tokens, completion tokens


@dataclass
class Answer:
    """What the lines of one history say, read but not judged."""

    text: str = ""
    tokens: list[str] | None = None
    gained_at: list[float] = field(default_factory=list)  # when tokens came
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[dict[str, int]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    num_done: int = 0
    num_pings: int = 0
    problems: list[str] = field(default_factory=list)  # lines that stand where they may not, or say nonsense


def read(history: History) -> Answer:
    """Read every line; a line after an end is a problem of its own."""
    answer = Answer()
    for at, line in history.lines:
        if line.startswith(":"):
            answer.num_pings += 1
            continue
        if answer.num_done or answer.errors:
            answer.problems.append(f"something follows the end: {line[:80]}")
        payload = line.removeprefix("data: ") if history.is_stream else line
        if payload == "[DONE]":
            answer.num_done += 1
            continue
        try:
            said = json.loads(payload)
        except ValueError:
            answer.problems.append(f"not JSON: {line[:80]}")
            continue
        _take(answer, at, said)
    return answer


def _take(answer: Answer, at: float, said: dict[str, Any]) -> None:
    if "error" in said:
        answer.errors.append(said["error"])
        return
    answer.ids.add(said.get("id", ""))
    if said.get("usage"):
        answer.usages.append(said["usage"])
    for choice in said.get("choices", []):
        part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        ended = choice.get("finish_reason")
        if answer.finish_reasons and (part.get("content") or ended):
            answer.problems.append(f"text or an end follows the end: {json.dumps(choice)[:80]}")
        answer.text += part.get("content") or ""
        logprobs = choice.get("logprobs")
        if logprobs:
            told = logprobs.get("tokens") or [entry["token"] for entry in logprobs.get("content") or []]
            answer.tokens = (answer.tokens or []) + told
        if not ended and "role" not in part:
            answer.gained_at.append(at)
        if ended:
            answer.finish_reasons.append(ended)


def golden_of(history: History) -> Golden:
    """The golden answer that a history without faults shows. Raises AssertionError when it is not sound itself."""
    answer = read(history)
    assert len(answer.finish_reasons) == 1 and len(answer.usages) == 1, (history.status, history.lines[-3:])
    usage = answer.usages[0]
    golden = Golden(
        answer.text,
        None if answer.tokens is None else tuple(answer.tokens),
        answer.finish_reasons[0],
        (usage["prompt_tokens"], usage["completion_tokens"]),
    )
    assert not check(history, golden), check(history, golden)
    return golden


def check(history: History, golden: Golden) -> list[str]:
    """All that is wrong with a request that should have finished as if nothing had happened; nothing when it did."""
    answer = read(history)
    problems = _common(history, answer)
    if answer.errors or history.status != 200:  # then the rest is missing too
        return [f"{history.name}: {problem}" for problem in [f"status {history.status}: {answer.errors}", *problems]]
    if answer.text != golden.text:
        problems.append("text: " + difference(answer.text, golden.text))
    if golden.tokens is not None and tuple(answer.tokens or ()) != golden.tokens:
        problems.append("tokens: " + difference(tuple(answer.tokens or ()), golden.tokens))
    if answer.finish_reasons != [golden.finish_reason]:
        problems.append(f"finish reasons {answer.finish_reasons}, not one {golden.finish_reason}")
    prompt, completion = golden.usage
    expected = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if answer.usages != [expected]:
        problems.append(f"usage {answer.usages}, not one {expected}")
    if answer.num_done != history.is_stream:
        problems.append(f"{answer.num_done} times [DONE]")
    return [f"{history.name}: {problem}" for problem in problems]


def check_failed(history: History, golden: Golden | None, code: str) -> list[str]:
    """All that is wrong with a request that should have failed, with this code, and after sound tokens only.

    `golden`: what it would have got without the fault; None where nobody can know.
    """
    answer = read(history)
    problems = _common(history, answer)
    if [error.get("code") for error in answer.errors] != [code]:
        problems.append(f"errors {answer.errors}, not one {code}")
    if answer.finish_reasons or answer.num_done:
        problems.append(f"claims to have finished: {answer.finish_reasons}, {answer.num_done} times [DONE]")
    if golden is not None and not golden.text.startswith(answer.text):
        problems.append("text before the error: " + difference(answer.text, golden.text))
    if history.status not in ((200, 500) if history.is_stream else (500,)):  # a stream may have begun
        problems.append(f"status {history.status}")
    return [f"{history.name}: {problem}" for problem in problems]


def _common(history: History, answer: Answer) -> list[str]:
    """What no request may show, however it ends."""
    problems = list(answer.problems)
    if history.ended_at is None:
        problems.append("no end")
    if history.lost:
        problems.append(f"connection lost: {history.lost}")
    if not (answer.finish_reasons or answer.errors):
        problems.append("neither an end nor an error")
    if len(answer.ids) > 1:
        problems.append(f"several ids: {sorted(answer.ids)}")
    return problems


def difference(got: Sequence[str], expected: Sequence[str]) -> str:
    """Where two texts (or lists of tokens) part, and whether a piece is doubled or lost there."""
    pairs = enumerate(zip(got, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(got), len(expected)))
    more = len(got) - len(expected)
    kind = "differs"
    if more > 0 and got[at + more :] == expected[at:]:
        kind = f"{more} doubled"
    elif more < 0 and got[at:] == expected[at - more :]:
        kind = f"{-more} lost"
    return f"{kind} at {at} of {len(expected)}: {got[at : at + 24]!r} for {expected[at : at + 24]!r}"


def stall(history: History, begin: float, end: float) -> float:
    """The longest time without a token that touches [begin, end], in seconds; from the sending to the last token."""
    answer = read(history)
    marks = [history.sent_at, *answer.gained_at]
    touching = [after - before for before, after in pairwise(marks) if before <= end and after >= begin]
    return max(touching, default=0.0)
