"""Hostile and broken requests: what is sent, byte for byte, and what has to come back.

After each of them the server has to be as it was: the same answers to others, the same processes, no block in use.
"""

import json
import re
import socket
import struct
import time
from dataclasses import dataclass, field, replace
from typing import Any

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
SECRETS = re.compile(r"Traceback|0x[0-9a-f]{4}|/etc/|/usr/|/work|/tmp/|site-packages|\.py\b|169\.254|canary")
NOTHING = 0  # as a status: the connection ends without an answer


@dataclass(frozen=True)
class Target:
    """What the cases need to know of the server that they are sent to."""

    model: str
    vocab_size: int
    max_model_len: int
    max_requests: int
    max_body_bytes: int
    request_s: float


@dataclass(frozen=True)
class Case:
    """One request. `status`: all that are right. `param`: what the error names; None where it may name nothing."""

    id: str
    status: tuple[int, ...]
    body: bytes = b""
    param: str | None = None
    code: str | None = None
    path: str = COMPLETIONS
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)
    is_from_app: bool = True  # our app answers, so that errors are OpenAI's objects; False: a server before it does
    raw: bytes | None = None  # instead of a well-formed request
    manner: str = ""  # how it is sent: see `_push`
    num_answers: int = 1  # that come where all is well

    def request(self) -> bytes:
        """As it goes over the wire."""
        if self.raw is not None:
            return self.raw
        lines = [f"{self.method} {self.path} HTTP/1.1".encode("latin-1"), b"host: x", b"connection: close"]
        lines += [name + b": " + value for name, value in self.headers]
        return b"\r\n".join([*lines, b"content-length: %d" % len(self.body), b"", b""]) + self.body


@dataclass
class Answer:
    """What came back."""

    status: int = NOTHING
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    num_answers: int = 0  # this is the first of so many


def send(address: tuple[str, int], case: Case, timeout_s: float = 20.0) -> Answer:
    """Send it in its manner and read until the connection ends."""
    began = time.monotonic()
    received = b""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        try:
            _push(connection, case)
            while part := connection.recv(1 << 16):
                received += part
        except OSError:
            pass  # closed in the middle of what we had to say
    answer = _parse(received, time.monotonic() - began)
    answer.num_answers = len(re.findall(rb"HTTP/1\.[01] [2-5]\d\d", received))
    return answer


def _push(connection: socket.socket, case: Case) -> None:
    request = case.request()
    head, gap, body = request.partition(b"\r\n\r\n")
    if case.manner == "dribble":
        connection.sendall(head + gap)
        for at in range(0, len(body), 16):
            connection.sendall(body[at : at + 16])
            time.sleep(0.01)
    elif case.manner == "head only":
        connection.sendall(head + gap + body[: len(body) // 2])
        connection.shutdown(socket.SHUT_WR)
    elif case.manner == "reset":
        connection.sendall(request)
        time.sleep(0.02)
        _reset(connection)
        raise ConnectionError
    elif case.manner == "half-close":
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.sendall(request)


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no farewell
    connection.close()


def _parse(received: bytes, seconds: float) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    while len(lines[0].split()) > 1 and lines[0].split()[1] == "100":  # Expect
        head, _, body = body.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
    if len(lines[0].split()) < 2:
        return Answer(seconds=seconds)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if "chunked" in headers.get("transfer-encoding", ""):
        body = _unchunked(body)
    return Answer(int(lines[0].split()[1]), headers, body, seconds)


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            break  # what follows is another answer
        whole, body = whole + body[:length], body[length + 2 :]
    return whole


def check(case: Case, answer: Answer) -> None:
    """Fails unless the answer is what the case promises."""
    told = answer.body[:300]
    assert answer.status in case.status, f"{case.id}: {answer.status}, {told!r}"
    assert answer.status != 200 or answer.num_answers >= case.num_answers, f"{case.id}: {answer.num_answers} answers"
    if answer.status >= 400:
        assert len(answer.body) <= 4096, f"{case.id}: {len(answer.body)} bytes"
        assert not SECRETS.search(answer.body.decode("utf-8", "replace")), f"{case.id}: {told!r}"
    if answer.status < 400 or not case.is_from_app or case.method == "HEAD":
        return
    assert answer.headers["content-type"] == "application/json", f"{case.id}: {answer.headers}"
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}, f"{case.id}: {told!r}"
    assert error["message"] and error["type"] == "invalid_request_error", f"{case.id}: {told!r}"
    assert error["param"] == case.param, f"{case.id}: {told!r}"
    if case.code is not None:
        assert error["code"] == case.code, f"{case.id}: {told!r}"


def corpus(target: Target) -> list[Case]:
    """All cases, each with an id of its own."""
    cases = [*_raw_bodies(target), *_fields(target), *_prompts(target), *_chats(target), *_tokens(target)]
    cases += [*_routes(target), *_wire(target), *_manners(target)]
    assert len({case.id for case in cases}) == len(cases), "two cases have one id"
    return cases


def _completion(target: Target, **changes: Any) -> bytes:
    body = {"model": target.model, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return json.dumps({**body, **changes}).encode()


def _chat(target: Target, **changes: Any) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": target.model, "messages": messages, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return json.dumps({**body, **changes}).encode()


def _spliced(body: bytes, field_name: str, value: bytes) -> bytes:
    """A field whose value Python's json would not write."""
    return body[:-1] + b', "' + field_name.encode() + b'": ' + value + b"}"


def _raw_bodies(target: Target) -> list[Case]:
    good = _completion(target)
    broken = {
        "empty": b"",
        "null": b"null",
        "a number": b"42",
        "a text": b'"x"',
        "a list": b"[]",
        "an open brace": b"{",
        "a trailing comma": b'{"a":1,}',
        "a byte order mark": b"\xef\xbb\xbf{}",
        "utf-16": "{}".encode("utf-16"),
        "a NUL": b"\x00",
        "a NUL behind": good + b"\x00",
        "two objects": good + good,
        "single quotes": good.replace(b'"', b"'"),
        "a comment": b"/* */" + good,
        "half a character": good.replace(b"hello", b"\xe4\xbd"),
        "overlong utf-8": good.replace(b"hello", b"\xc0\xaf"),
        "a lone surrogate": good.replace(b"hello", b"\\ud800"),
        "a reversed pair": good.replace(b"hello", b"\\udc00\\ud800"),
        "a raw newline": good.replace(b"hello", b"a\nb"),
        "NaN": _spliced(good, "top_p", b"NaN"),
        "Infinity": _spliced(good, "top_p", b"Infinity"),
        "-Infinity": _spliced(good, "top_p", b"-Infinity"),
        "100,000 brackets": b"[" * (min(100_000, target.max_body_bytes - 1)),
        "10,000 levels": b'{"a":' * 10_000,
        "parts nested 300 deep": _spliced(_chat(target), "x", b"[" * 300 + b"]" * 300),
        "5,000 digits": _spliced(good, "n", b"9" * 5000),
        "10,001 lists": _spliced(good, "metadata", b"[" + b"[]," * 10_000 + b"[]]"),
        "an unending string of escapes": b'{"a":"' + b'\\"' * 20_000,
    }
    cases = [Case(f"body: {name}", (400,), body) for name, body in broken.items()]
    cases.append(Case("body: 1e400", (400,), _spliced(good, "top_p", b"1e400"), "top_p"))
    types = {"a form": b"application/x-www-form-urlencoded", "plain": b"text/plain", "odd": b"application/json-x\xff"}
    for name, kind in types.items():
        cases.append(Case(f"content type: {name}", (415,), good, headers=((b"content-type", kind),)))
    cases.append(Case("content type: none", (415,), good, headers=()))
    cases.append(Case("content type: twice", (200, 415), good, headers=((b"content-type", b"application/json"),) * 2))
    large = _completion(target, user="x" * target.max_body_bytes)
    cases.append(Case("too large, announced", (413,), large))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (1024, b"x" * 1024) for _ in range(target.max_body_bytes // 1024 + 1))
    chunked = (head + "transfer-encoding: chunked\r\n\r\n").encode() + chunks + b"0\r\n\r\n"
    # The answer comes before all is sent, and may be lost when the connection is closed over what is still under way.
    cases.append(Case("too large, in chunks", (413, NOTHING), raw=chunked))
    return cases


def _fields(target: Target) -> list[Case]:
    """One wrong field in a good body, which the error has to name."""
    vocab = target.vocab_size
    wrong: dict[str, list[Any]] = {
        "temperature": [-0.1, 2.1, "1", True, [1]],
        "top_p": [0, -0.1, 1.1, "x"],
        "top_k": [-2, 1.5, 2**31, 10**30],
        "min_p": [-0.1, 1.1],
        "max_tokens": [0, -1, "10", 1.5, True, 10**9, 10**40],
        "min_tokens": [-1, 5, 10**9 + 1],
        "presence_penalty": [2.1, "1"],
        "frequency_penalty": [-2.1],
        "repetition_penalty": [0, 1e308],
        "seed": [2**63, 1.5, "1"],
        "n": [0, 129, True, 1.0, 10**30],
        "stop": [[""], "", ["x"] * 17, ["x"] * 10_000, "x" * 2000, [1], {"a": 1}, [None]],
        "logprobs": [21, -1, True, 1.5],
        "logit_bias": [
            {str(vocab): 1},
            {"-1": 1},
            {"x": 1},
            {"5": 101},
            {"5": None},
            {str(token): 1 for token in range(1025)},
            [5],
        ],
        "stop_token_ids": [[vocab], [-1], [1.5], list(range(129)), [2**63]],
        "timeout": [0, -1, "1", True, target.request_s + 1],
        "stream": ["yes", 1],
        "stream_options": [{"include_usage": True}, 7],
        "echo": [1],
        "model": [7, None, ["x"]],
        "response_format": ["", [], 5],
        "structured_outputs": [{}, {"regex": "a", "choice": ["b"]}, "json"],
        "guided_json": ["{", 5, [{}]],
        "guided_choice": [[], ["x"] * 4097, [""]],
        "guided_grammar": ["", 5],
        "best_of": [2, True],
        "suffix": ["x"],
        "prompt_embeds": ["AAAA"],
        "bad_words": [["x"] * 129, [[vocab + 5]], ["x" * 257]],
        "allowed_token_ids": [[vocab + 5]],
        "guided_regex": ["", 5, "(?=a)b", "("],
        "use_beam_search": [True],
        "kv_transfer_params": [{"remote_host": "169.254.169.254"}],
        "priority": [2**31, "1"],
        "cache_salt": [5, "x" * 257],
        "temprature": [0.5],  # unknown fields pass, but not one that was meant to change the answer
        "max_new_tokens": [5],
        "truncate_prompt_tokens": [-2, 0, 2**70],
        "truncation_side": ["middle"],
        "prompt_logprobs": [-1, 21],
        "request_id": ["x" * 129, "a\r\nx-canary: 1"],
        "detokenize": [False],
        "lora_request": [{"path": "/etc/canary"}],
    }
    cases = []
    for name, values in wrong.items():
        for number, value in enumerate(values):
            body = _completion(target, **{name: value})
            cases.append(Case(f"field: {name} {number}", (400,), body, name))
    odd = ["/etc/passwd\r\nx-canary: 1" + "x" * 2000, "a.b", "", "\u20ac"]  # told in a header
    for number, name in enumerate(odd):
        cases.append(Case(f"field: an odd name {number}", (200,), _completion(target, **{name: 1})))
    many = _completion(target, **{f"unknown_{number}": 1 for number in range(33)})
    cases.append(Case("field: 33 odd names", (400,), many, "unknown_32", "unknown_parameter"))
    other = _completion(target, model="../../etc/canary")
    cases.append(Case("field: another model", (404,), other, "model", "model_not_found"))
    return cases


def _prompts(target: Target) -> list[Case]:
    vocab, longest = target.vocab_size, target.max_model_len
    wrong: dict[str, Any] = {
        "absent": None,
        "no ids": [],
        "no ids in a list": [[]],
        "a negative id": [-1],
        "an id too large": [vocab],
        "an id of 31 bits": [2**31],
        "an id of 63 bits": [2**63],
        "an id of 100 digits": [10**100],
        "a fraction": [1.5],
        "truth": [True],
        "texts and numbers": ["a", 1],
        "ids and texts": [[5], ["a"]],
        "one bad of two": [[5], [vocab]],
        "an object": {"a": 1},
        "nothing in a list": [None],
        "three levels": [[[5]]],
        "too many": ["a"] * (target.max_requests + 1),
    }
    cases = [
        Case(f"prompt: {name}", (400,), _completion(target, prompt=value), "prompt") for name, value in wrong.items()
    ]
    too_long: dict[str, Any] = {"ids": [5] * longest, "text": "word " * (2 * longest), "one word": "a" * (8 * longest)}
    for name, value in too_long.items():
        body = _completion(target, prompt=value)
        cases.append(Case(f"prompt: too long, {name}", (400,), body, "prompt", "context_length_exceeded"))
    many = _completion(target, prompt=["a"] * target.max_requests, n=2)
    cases.append(Case("prompt: too many with n", (400,), many, "prompt"))
    cases.append(
        Case("prompt: empty", (200, 400), _completion(target, prompt=""), "prompt")
    )  # 200 with a token of its own
    fine: dict[str, Any] = {
        "blank": " \n\t",
        "NUL": "\x00",
        "odd": "\ufffe\uffff\u202e\U0010ffff",
        "special": "</s><s>",
    }
    cases += [Case(f"prompt: {name}", (200,), _completion(target, prompt=value)) for name, value in fine.items()]
    return cases


_HOSTILE_SCHEMAS: dict[str, dict[str, Any]] = {
    "a reference to itself": {"$ref": "#"},
    "many values": {"enum": [f"value {at}" for at in range(3000)], "not": {}},
    "another host": {"$ref": "http://169.254.169.254/latest"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a huge length": {"type": "string", "maxLength": 2**62},
    "an expression that explodes": {"type": "string", "pattern": ".*a.{400}", "maxLength": 10**5},
    "our own keyword": {"x-guidance": {"lenient": True}},
}


def _chats(target: Target) -> list[Case]:
    def part(**content: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [content]}]

    user = {"role": "user", "content": "x"}
    wrong: dict[str, tuple[Any, str]] = {
        "absent": (None, "messages"),
        "none": ([], "messages"),
        "a text": ("hello", "messages"),
        "no role": ([{"content": "x"}], "messages.0.role"),
        "an odd role": ([{"role": "function", "content": "x"}], "messages.0.role"),
        "a number as content": ([{"role": "user", "content": 7}], "messages.0.content"),
        "no content": ([user, {"role": "user"}], "messages.1.content"),
        "a list as a message": ([["user", "x"]], "messages.0"),
        "2,049 of them": ([user] * 2049, "messages"),
        "an image of the metadata service": (
            part(type="image_url", image_url={"url": "http://169.254.169.254/x"}),
            "messages.0.content.0",
        ),
        "an image of a file": (part(type="image_url", image_url={"url": "file:///etc/canary"}), "messages.0.content.0"),
        "an image as data": (
            part(type="image_url", image_url={"url": "data:image/png;base64," + "A" * 20_000}),
            "messages.0.content.0",
        ),
        "sound": (part(type="input_audio", input_audio={"data": "AAAA"}), "messages.0.content.0"),
        "a file": (part(type="file", file={"file_id": "x"}), "messages.0.content.0"),
        "a part without text": (part(type="text"), "messages.0.content.0.text"),
        "calls": (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "messages.0.tool_calls.0.function",
        ),
        "calls of a user": (
            [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
            "messages.0.tool_calls",
        ),
    }
    cases = [
        Case(f"messages: {name}", (400,), _chat(target, messages=value), param, path=CHATS)
        for name, (value, param) in wrong.items()
    ]
    fields: dict[str, list[Any]] = {
        "chat_template": ["{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}"],
        "chat_template_kwargs": [{"chat_template": "x"}, {"tokenize": True}, {"__class__": 1}, 5],
        "tool_choice": ["required", {"type": "function", "function": {"name": "x"}}],
        "top_logprobs": [21, 5, -1],
        "logprobs": [5],
        "max_completion_tokens": [0, 10**9, "1"],
        "documents": [[{"text": "x"}]],
        "reasoning_effort": ["highest"],
        "functions": [[{"name": "x"}]],
        "modalities": [["audio"]],
        "continue_final_message": [1],
    }
    for name, values in fields.items():
        for number, value in enumerate(values):
            changes = {name: value} | ({"max_tokens": None} if name == "max_completion_tokens" else {})
            cases.append(Case(f"chat: {name} {number}", (400,), _chat(target, **changes), name, path=CHATS))
    tools = [
        ({"type": "web_search"}, "tools.0"),
        ({"type": ["function"]}, "tools.0"),
        ({"function": {"name": "x" * 200}}, "tools.0.function.name"),
        ({"function": {"name": "</tool_call>"}}, "tools.0.function.name"),
        ({"function": {"name": "x", "strict": "yes"}}, "tools.0.function.strict"),
        ({"function": {"name": "x", "parameters": []}}, "tools.0.function.parameters"),
    ]
    schema = "response_format.json_schema.schema"
    for name, value in _HOSTILE_SCHEMAS.items():
        body = _chat(target, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})
        cases.append(Case(f"schema: {name}", (400,), body, schema, path=CHATS))
    for number, (tool, param) in enumerate(tools):
        cases.append(Case(f"chat: a tool {number}", (400,), _chat(target, tools=[tool]), param, path=CHATS))
    many = [{"function": {"name": str(at)}} for at in range(300)]
    cases.append(Case("chat: 300 tools", (400,), _chat(target, tools=many), "tools", path=CHATS))
    both = _chat(target, max_completion_tokens=5)
    cases.append(Case("chat: two limits", (400,), both, "max_tokens", path=CHATS))
    long = _chat(target, messages=[{"role": "user", "content": "word " * (2 * target.max_model_len)}])
    cases.append(Case("messages: too long", (400,), long, "messages", "context_length_exceeded", path=CHATS))
    short = _chat(target, messages=[{"role": "user", "content": ""}] * 1000)
    cases.append(Case("messages: 1,000 of nothing", (400,), short, "messages", path=CHATS))
    return cases


def _tokens(target: Target) -> list[Case]:
    messages = [{"role": "user", "content": "x"}]
    wrong: list[tuple[str, str, dict[str, Any], str | None]] = [
        ("both", "/tokenize", {"prompt": "x", "messages": messages}, "prompt"),
        ("neither", "/tokenize", {}, "prompt"),
        ("a number", "/tokenize", {"prompt": 7}, "prompt"),
        ("too large", "/detokenize", {"tokens": [target.vocab_size]}, "tokens"),
        ("negative", "/detokenize", {"tokens": [-1]}, "tokens"),
        ("texts", "/detokenize", {"tokens": ["x"]}, "tokens"),
        ("huge", "/detokenize", {"tokens": [2**64]}, "tokens"),
    ]
    return [
        Case(f"{path}: {name}", (400,), json.dumps(body).encode(), param, path=path)
        for name, path, body, param in wrong
    ]


def _routes(target: Target) -> list[Case]:
    good = _completion(target)
    cases = [
        Case(f"route: {method} {path[:40]}", (status,), good if method == "POST" else b"", path=path, method=method)
        for method, path, status in [
            ("GET", COMPLETIONS, 405),
            ("PUT", COMPLETIONS, 405),
            ("DELETE", "/health", 405),
            ("POST", "/v1/models", 405),
            ("PATCH", "/cluster", 405),
            ("OPTIONS", CHATS, 405),
            ("HEAD", COMPLETIONS, 405),
            ("POST", COMPLETIONS + "/", 404),
            ("POST", "//v1/completions", 404),
            ("POST", "/V1/COMPLETIONS", 404),
            ("POST", "/pause", 404),
            ("POST", "/update_weights", 404),
            ("GET", "/../etc/passwd", 404),
            ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
            ("GET", "/%00", 404),
            ("GET", "/v1/" + "x" * 3000, 404),
        ]
    ]
    for name in ("%2e%2e%2fetc%2fcanary", "x" * 3000, "%ff%fe", "%00"):
        case = Case(f"route: model {name[:12]}", (404,), param="model", path=f"/v1/models/{name}", method="GET")
        cases.append(replace(case, code="model_not_found"))
    return cases


def _wire(target: Target) -> list[Case]:
    """What servers before our app see: headers and framing."""
    good = _completion(target)
    json_type = (b"content-type", b"application/json")

    def with_header(name: bytes, value: bytes) -> tuple[tuple[bytes, bytes], ...]:
        return (json_type, (name, value))

    headers = {
        "a request id that is not utf-8": (b"x-request-id", b"\xff\xfe"),
        "a session id that is not utf-8": (b"x-session-id", b"\xff"),
        "a model id that is not utf-8": (b"serve_multiplexed_model_id", b"\xff"),
        "a model id": (b"serve-multiplexed-model-id", b"x"),
        "no watch": (b"x-request-disconnect-disabled", b"?1"),
        "no watch, not utf-8": (b"x-request-disconnect-disabled", b"\xff"),
        "no timeout": (b"x-request-timeout-seconds", b"0"),
        "an endless timeout": (b"x-request-timeout-seconds", b"inf"),
        "a timeout that is no number": (b"x-request-timeout-seconds", b"NaN"),
        "a timeout that is not utf-8": (b"x-request-timeout-seconds", b"\xff"),
        "a trace that is none": (b"traceparent", b"00-x"),
        "a forwarded host": (b"x-forwarded-host", b"169.254.169.254"),
        "a value of 7 KB": (b"x-long", b"x" * 7000),
        "latin-1": (b"x-title", b"h\xe9llo"),
    }
    cases = [Case(f"header: {name}", (200,), good, headers=with_header(*header)) for name, header in headers.items()]
    refused = (400, 408, 411, 413, 414, 431, 501, 505, NOTHING)
    raw = {
        "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        "a negative length": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        "a length of 30 digits": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: "
        + b"9" * 30
        + b"\r\n\r\n",
        "two lengths": b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "a broken chunk": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        "a space in a name": b"GET /health HTTP/1.1\r\nhost: x\r\nbad name: x\r\nconnection: close\r\n\r\n",
        "a version": b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
        "a NUL in a header": b"GET /health HTTP/1.1\r\nhost: x\r\na: \x00\r\nconnection: close\r\n\r\n",
        "a length and chunks": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "a path that is not ascii": b"GET /\xff\xc3\xa9 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        "a host that is not ascii": b"GET /health HTTP/1.1\r\nhost: \xff\r\nconnection: close\r\n\r\n",
        "a name that is not ascii": b"GET /health HTTP/1.1\r\nhost: x\r\n\xff: x\r\nconnection: close\r\n\r\n",
        "a folded header": b"GET /health HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\nconnection: close\r\n\r\n",
        "a million bytes of header": b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\na: "
        + b"x" * 10**6
        + b"\r\n\r\n",
    }
    for name, request in raw.items():
        statuses = (*refused, 200) if request.startswith(b"GET") else refused
        # Some servers wait for the rest of what was announced: the sender says that there is none.
        cases.append(Case(f"wire: {name}", statuses, raw=request, is_from_app=False, manner="half-close"))
    return cases + _large_and_odd(target)


def _large_and_odd(target: Target) -> list[Case]:
    """What is well formed, and more than is taken, or of a kind that servers read differently."""
    good = _completion(target)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    length = b"content-length: %d\r\n" % len(good)
    upgrade = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAEA\r\n"
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"  # ends the connection where all is read
    java = head + upgrade + length + b"\r\n" + good + last
    twice = head + b"connection: close\r\n" + length + length + b"\r\n" + good
    endless = head + b"transfer-encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 2**16 + b"\r\n") * 64
    large = ((b"content-type", b"application/json"), (b"a", b"x" * 2**15))
    return [
        Case("wire: an upgrade as Java sends it", (200, 400), raw=java),
        Case("wire: the same length twice", (200, 400), raw=twice, is_from_app=False),
        Case("wire: 33 KB of headers", (431,), good, headers=large),
        Case("wire: chunks above the limit", (413, NOTHING), raw=endless),
    ]


def _manners(target: Target) -> list[Case]:
    """Good requests by clients that behave badly."""
    good = _completion(target, max_tokens=32)
    stream = _completion(target, max_tokens=32, stream=True, n=4)
    expecting = ((b"content-type", b"application/json"), (b"expect", b"100-continue"))
    twice = Case("", (200,), good).request().replace(b"connection: close", b"connection: keep-alive")
    return [
        Case("manner: a body in drips", (200,), good, manner="dribble"),
        Case("manner: half a body", (NOTHING, 400), good, manner="head only", is_from_app=False),
        Case("manner: half-closed", (200, NOTHING, 400, 499), good, manner="half-close", is_from_app=False),
        Case("manner: half-closed stream", (200, NOTHING, 400, 499), stream, manner="half-close", is_from_app=False),
        Case("manner: reset", (NOTHING,), good, manner="reset"),
        Case("manner: reset stream", (NOTHING,), stream, manner="reset"),
        Case("manner: reset chat", (NOTHING,), _chat(target, max_tokens=32), path=CHATS, manner="reset"),
        Case("manner: expects to be asked", (200,), good, headers=expecting),
        Case("manner: two at once", (200,), raw=twice + Case("", (200,), good).request(), num_answers=2),
    ]


@dataclass
class Said:
    """What a stream says, whatever chunks it comes in: who reads slowly for a moment gets fewer and larger ones."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    usage: dict[str, int] | None = None
    is_done: bool = False


def said(stream: bytes) -> Said:
    """Raises for anything that is no event of a sound stream."""
    told = Said()
    *events, rest = stream.split(b"\n\n")
    assert not rest and events, stream[-200:]
    for event in events:
        assert event.startswith(b"data: ") and not told.is_done, event
        if event == b"data: [DONE]":
            told.is_done = True
            continue
        chunk = json.loads(event[6:])
        told.usage = chunk.get("usage") or told.usage
        for choice in chunk["choices"]:
            told.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            told.logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
            told.ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    return told


def golden_requests(target: Target, max_tokens: int) -> list[Case]:
    """Four streams that always say the same."""
    bodies = [
        _completion(target, max_tokens=max_tokens, stream=True, logprobs=2),
        _completion(target, max_tokens=max_tokens, stream=True, temperature=1, seed=7),
        _completion(target, max_tokens=max_tokens, stream=True, stream_options={"include_usage": True}),
    ]
    goldens = [Case(f"golden {number}", (200,), body) for number, body in enumerate(bodies)]
    chat = Case("golden chat", (200,), _chat(target, max_tokens=max_tokens, stream=True), path=CHATS)
    return [*goldens, chat]
