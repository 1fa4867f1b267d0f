"""Requests drawn at random from what every route takes: the same seed, the same ones."""

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"model": "tiny", "prompt": "one two", "max_tokens": 3},
        {
            "model": "tiny",
            "prompt": [[5, 6], [7]],
            "max_tokens": 2,
            "n": 2,
            "logprobs": 2,
            "echo": True,
            "stream": True,
        },
    ],
    "/v1/chat/completions": [
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stop": ["a", "b"]},
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "be"}]},
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "user", "content": "hi", "name": "me"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            "max_completion_tokens": 3,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            "chat_template_kwargs": {"x": 1},
        },
    ],
    "/tokenize": [{"prompt": "hi", "return_token_strs": True}, {"messages": [{"role": "user", "content": "hi"}]}],
    "/detokenize": [{"tokens": [5, 6]}],
}
PAGES = [
    "/v1/models",
    "/v1/models/tiny",
    "/health",
    "/ready",
    "/version",
    "/cluster",
    "/metrics",
    "/tokenizer_info",
    "/x",
]
FIELDS = [
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of", "stop", "stop_token_ids", "logit_bias",
    "bad_words", "allowed_token_ids", "min_tokens", "timeout", "priority", "cache_salt", "tools", "tool_choice", "echo",
    "suffix",
    "structured_outputs", "guided_regex", "guided_json", "guided_choice", "prompt_logprobs", "truncate_prompt_tokens",
    "continue_final_message", "add_generation_prompt", "documents", "reasoning_effort", "request_id",
    "return_token_ids", "parallel_tool_calls", "repetition_penalty", "presence_penalty", "max_tokens", "stream_options",
    "response_format",
    "skip_special_tokens", "include_stop_str_in_output", "truncation_side", "messages", "prompt", "model", "é", "",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e-300, 2**31, 2**63, -(2**64), 10**30, "", "a",
    "\x00", "\ud800", "😀" * 9,
    "x" * 3000, [], [[]], {}, [None], [0], ["a"], [2**40], {"a": "b"}, {"": {}}, {"type": "json_object"},
    {"json": {"type": "integer"}}, {"json": {"$ref": "#"}}, {"regex": "(a|b)+"}, {"type": "text"}, "auto", "required",
    "none",
    {"0": 1, "5": -100}, [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    {"type": "function", "function": {"name": "f"}}, [{"role": "user", "content": "hi"}],
    [{"role": "tool", "content": None}],
]  # fmt: skip
HEADERS = [
    {}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=latin-1"},
    {"authorization": "Bearer x"},
    {"x-request-id": "a b"}, {"x-request-id": "é"}, {"accept": "x" * 9000}, {"upgrade": "h2c"}, {"origin": "null"},
]  # fmt: skip


class Drawn(NamedTuple):
    """One request."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


def requests(seed: int, count: int) -> Iterator[Drawn]:
    """So many of them."""
    chance = random.Random(seed)
    for _ in range(count):
        if chance.random() < 0.05:
            path = chance.choice(PAGES)
            yield Drawn(chance.choice(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]), path, b"", {})
            continue
        path = chance.choice(list(BODIES))
        body = json.loads(json.dumps(chance.choice(BODIES[path])))
        for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
            _change(chance, body)
        raw = json.dumps(body).encode()
        if chance.random() < 0.1:
            raw = _broken(chance, raw)
        headers = {"content-type": "application/json"}
        if chance.random() < 0.1:
            headers |= chance.choice(HEADERS)
        yield Drawn("POST" if chance.random() < 0.97 else "GET", path, raw, headers)


def _change(chance: random.Random, body: dict[str, Any]) -> None:
    """One value somewhere within, or one field more."""
    place: Any = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        deeper = [key for key in keys if isinstance(place[key], dict | list) and place[key]]
        if not deeper or chance.random() < 0.6:
            break
        place = place[chance.choice(deeper)]
    value = json.loads(json.dumps(chance.choice(VALUES)))
    if isinstance(place, list):
        place.insert(chance.randrange(len(place) + 1), value)
    elif keys and chance.random() < 0.2:
        place.pop(chance.choice(keys), None)
    else:
        place[chance.choice(FIELDS if place is body and chance.random() < 0.7 else keys or FIELDS)] = value


def _broken(chance: random.Random, raw: bytes) -> bytes:
    at, kind = chance.randrange(len(raw) + 1), chance.randrange(4)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9))) + raw[at:]
    if kind == 2:
        return b"[" * chance.choice([1, 200, 20_000]) + raw
    return raw.replace(b'"', b"'", 1) if chance.random() < 0.5 else raw + raw
