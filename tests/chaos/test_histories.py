"""The checker itself: made-up histories, good and bad in every way that counts."""

import dataclasses
import json
from typing import Any

import pytest

from tests.chaos.histories import Golden, History, check, check_failed, difference, golden_of, stall

TOKENS = ("a stage ", "owns ", "some ", "layers", ".")
GOLDEN = Golden("".join(TOKENS), TOKENS, "stop", (7, 6))
USAGE = {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}


def chunk(choices: list[Any], usage: Any = None, name: str = "cmpl-1") -> str:
    return "data: " + json.dumps({"id": name, "choices": choices, "usage": usage})


def gain(token: str, name: str = "cmpl-1") -> str:
    logprobs = {"tokens": [token], "token_logprobs": [-0.5]}
    return chunk([{"index": 0, "text": token, "finish_reason": None, "logprobs": logprobs}], name=name)


END = chunk([{"index": 0, "text": "", "finish_reason": "stop", "logprobs": None}])
COUNT = chunk([], USAGE)
DONE = "data: [DONE]"
ERROR = 'data: {"error": {"message": "rank 1 died", "type": "server_error", "param": null, "code": "engine_failure"}}'
SOUND = [gain(token) for token in TOKENS]


def stream(lines: list[str], **changes: Any) -> History:
    """One line a second."""
    timed = [(float(second + 1), line) for second, line in enumerate(lines)]
    history = History("r", {"stream": True}, sent_at=0.0, status=200, lines=timed, ended_at=len(lines) + 1.0)
    for key, value in changes.items():
        setattr(history, key, value)
    return history


def test_a_sound_stream_has_no_problem_and_is_its_own_golden() -> None:
    history = stream([*SOUND[:2], ": ping", *SOUND[2:], END, COUNT, DONE])
    assert check(history, GOLDEN) == []
    assert golden_of(history) == GOLDEN


def test_a_sound_plain_answer() -> None:
    logprobs = {"tokens": list(TOKENS)}
    choice = {"index": 0, "text": GOLDEN.text, "finish_reason": "stop", "logprobs": logprobs}
    body = chunk([choice], USAGE).removeprefix("data: ")
    history = stream([body], body={"stream": False})
    assert check(history, GOLDEN) == []
    assert golden_of(history) == GOLDEN


def test_a_sound_chat() -> None:
    deltas = [{"role": "assistant", "content": ""}, *({"content": token} for token in TOKENS)]
    lines = [chunk([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
    history = stream([*lines, chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}]), COUNT, DONE])
    assert check(history, Golden(GOLDEN.text, None, "stop", GOLDEN.usage)) == []
    assert stall(history, 0, 10) == 2.0  # the role is no token


BAD = {
    "a lost token": ([*SOUND[:2], *SOUND[3:], END, COUNT, DONE], "text: 5 lost at 13"),
    "a lost last token": ([*SOUND[:4], END, COUNT, DONE], "text: 1 lost at 24"),
    "a doubled token": ([*SOUND[:2], *SOUND[1:], END, COUNT, DONE], "text: 5 doubled at 13"),
    "another token": ([*SOUND[:2], gain("all "), *SOUND[3:], END, COUNT, DONE], "text: differs"),
    "a token without text lost": (
        [*SOUND[:2], gain("some layers"), SOUND[4], END, COUNT, DONE],
        "tokens: differs",
    ),
    "two ends": ([*SOUND, END, END, COUNT, DONE], "text or an end follows the end"),
    "text after the end": ([*SOUND, END, SOUND[4], COUNT, DONE], "text or an end follows the end"),
    "no end": ([*SOUND], "neither an end nor an error"),
    "no finish reason": ([*SOUND, COUNT, DONE], "not one stop"),
    "another finish reason": ([*SOUND, END.replace("stop", "length"), COUNT, DONE], "not one stop"),
    "wrong usage": ([*SOUND, END, COUNT.replace("13", "14"), DONE], "usage"),
    "usage that counts a token twice": (
        [*SOUND, END, chunk([], {"prompt_tokens": 7, "completion_tokens": 7, "total_tokens": 14}), DONE],
        "usage",
    ),
    "no usage": ([*SOUND, END, DONE], "usage"),
    "two usages": ([*SOUND, END, COUNT, COUNT, DONE], "usage"),
    "no [DONE]": ([*SOUND, END, COUNT], "0 times [DONE]"),
    "two [DONE]": ([*SOUND, END, COUNT, DONE, DONE], "2 times [DONE]"),
    "something after [DONE]": ([*SOUND, END, DONE, COUNT], "something follows the end"),
    "an error in the middle": ([*SOUND[:2], ERROR], "engine_failure"),
    "an error and an end": ([*SOUND, END, COUNT, ERROR, DONE], "something follows the end"),
    "another request's chunk": ([*SOUND[:4], gain(TOKENS[4], "cmpl-2"), END, COUNT, DONE], "several ids"),
    "half a line": ([*SOUND, END, COUNT[:-3], DONE], "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_stream_is_named(case: str) -> None:
    lines, words = BAD[case]
    problems = check(stream(lines), GOLDEN)
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ended_at": None}, "no end"),
        ({"lost": "ReadError"}, "connection lost"),
        ({"status": 503}, "status 503"),
    ],
)
def test_a_bad_connection_is_named(changes: dict[str, Any], words: str) -> None:
    history = stream([*SOUND, END, COUNT, DONE], **changes)
    assert any(words in problem for problem in check(history, GOLDEN))


def test_a_failure_that_was_due() -> None:
    assert check_failed(stream([*SOUND[:2], ": ping", ERROR]), GOLDEN, "engine_failure") == []
    assert check_failed(stream([*SOUND[:2], ERROR]), GOLDEN, "numerical_error")
    assert check_failed(stream([SOUND[1], ERROR]), GOLDEN, "engine_failure")  # not its own text
    assert check_failed(stream([*SOUND, END, COUNT, DONE]), GOLDEN, "engine_failure")
    assert check_failed(stream([*SOUND[:2], ERROR, DONE]), GOLDEN, "engine_failure")
    assert check_failed(stream([*SOUND[:2]]), GOLDEN, "engine_failure")
    plain = stream([ERROR.removeprefix("data: ")], body={}, status=500)
    assert check_failed(plain, None, "engine_failure") == []
    assert check_failed(dataclasses.replace(plain, status=200), None, "engine_failure")


def test_where_texts_part() -> None:
    assert difference("abcabcd", "abcd").startswith("3 doubled at 3")
    assert difference("abd", "abcd").startswith("1 lost at 2")
    assert difference("", "ab").startswith("2 lost at 0")
    assert difference("aaa", "aaaa").startswith("1 lost at 3")
    assert difference("abXd", "abcd").startswith("differs at 2")


def test_the_longest_stall() -> None:
    history = stream([SOUND[0], ": ping", ": ping", ": ping", *SOUND[1:], END, COUNT, DONE])
    assert stall(history, 2.5, 3.0) == 4.0  # pings are no tokens
    assert stall(history, 0.0, 0.5) == 1.0  # from the sending to the first
    assert stall(history, 6.5, 20.0) == 1.0  # after the last token nothing stalls
    assert stall(history, 30.0, 40.0) == 0.0
